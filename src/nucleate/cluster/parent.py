"""A process that ends when its parent ends, however the parent ends; also the first program of a rank.

`python parent.py PID command...` binds itself to the process PID and then becomes the command. The binding stays, and
the command runs as without it. This file imports nothing of nucleate, so that it starts in milliseconds.
"""

import os
import signal
import sys
import threading
import time

#: An option of `prctl` in Linux (linux/prctl.h).
_PR_SET_PDEATHSIG = 1
_POLL_S = 1.0


def bind(parent: int) -> None:
    """End this process when its parent ends. On Linux the kernel does it; elsewhere a thread looks every second.

    Args:
        parent: The process id of the parent, which may have ended already.
    """
    if not _ask_the_kernel():
        threading.Thread(target=_watch, args=(parent,), name="nucleate-parent", daemon=True).start()
    elif os.getppid() != parent:
        os._exit(1)


def _ask_the_kernel() -> bool:
    if sys.platform != "linux":
        return False
    import ctypes

    try:
        # Only this signal ends a process for certain that waits inside of C++.
        return bool(ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) == 0)
    except (OSError, AttributeError):
        return False


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(1)


if __name__ == "__main__":
    if _ask_the_kernel() and os.getppid() != int(sys.argv[1]):
        sys.exit(1)
    os.execv(sys.argv[2], sys.argv[2:])
