"""A process that ends when its parent ends, however the parent ends; also the first program of a rank.

`python parent.py PID command...` binds itself to the process PID and then becomes the command. The binding stays, and
the command runs as without it. This file imports nothing of nucleate, so that it starts in milliseconds.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

#: An option of `prctl` in Linux (linux/prctl.h).
_PR_SET_PDEATHSIG = 1
_POLL_S = 1.0


def bind(process: int) -> None:
    """End this process when another one ends. On Linux the kernel does it if it can, else a thread of this process.

    Args:
        process: The process id of the parent, or on Linux of an earlier ancestor. It may have ended already.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and _was_made_by_main_thread(process) and _ask_the_kernel():
        if os.getppid() != process:
            os._exit(1)
        return
    descriptor = _descriptor(process)
    if descriptor is None:
        _start_thread(_look, process)
    else:
        _start_thread(_wait, descriptor)


def _was_made_by_main_thread(process: int) -> bool:
    """Return whether the main thread of another process has started this one.

    The kernel sends its signal when the thread ends that started this process (prctl(2)). Only the main thread's end is
    the end of the process.
    """
    try:
        with open(f"/proc/{process}/task/{process}/children") as children:
            return str(os.getpid()) in children.read().split()
    except OSError:
        return False


def _ask_the_kernel() -> bool:
    if sys.platform != "linux":
        return False
    import ctypes

    try:
        # Only this signal ends a process for certain that waits inside of C++.
        return bool(ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) == 0)
    except (OSError, AttributeError):
        return False


def _descriptor(process: int) -> int | None:
    """Return a file descriptor of a process, or None if the system has no such descriptors."""
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(process)
    except ProcessLookupError:
        os._exit(1)
    except OSError:
        # Linux before 5.3, or a sandbox that forbids the call.
        return None


def _start_thread(target: Callable[[int], None], argument: int) -> None:
    threading.Thread(target=target, args=(argument,), name="nucleate-parent", daemon=True).start()


def _wait(descriptor: int) -> None:
    """Sleep until the process of a descriptor ends, then end this one."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll()
    os._exit(1)


def _look(process: int) -> None:
    """Look every second whether a process lives, and end this one after it."""
    is_parent = os.getppid() == process
    while os.getppid() == process if is_parent else _lives(process):
        time.sleep(_POLL_S)
    os._exit(1)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


if __name__ == "__main__":
    parent = int(sys.argv[1])
    # A thread would not outlive `execv`. Where the kernel does not bind this process, the start of the group does.
    if _was_made_by_main_thread(parent):
        _ask_the_kernel()
    if os.getppid() != parent:
        sys.exit(1)
    os.execv(sys.argv[2], sys.argv[2:])
