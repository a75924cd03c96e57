"""A worker process of a data loader, while its rank waits for the end of a step after SIGTERM."""

from __future__ import annotations

import os
import signal
import threading

_POLL_S = 1.0


def outlive_sigterm() -> None:
    """Let this worker of a data loader ignore SIGTERM, unless its parent sends it.

    Launchers send the signal to the rank's whole process group, and the rank needs its workers until the step has
    ended. Where the system cannot tell who sent a signal, this does nothing.
    """
    if not hasattr(signal, "sigtimedwait"):
        return
    # Threads inherit the mask. torch's own handler in a worker would end it (DataLoader.cpp, 2.13).
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey, args=(os.getppid(),), name="nucleate-sigterm", daemon=True).start()


def _obey(parent: int) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, _POLL_S)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
