"""Forks of a process that has imported torch: its threads before a fork, and the beginning and end of the fork."""

from __future__ import annotations

import atexit
import ctypes
import gc
import signal

#: A value of OpenMP's `omp_pause_resource_t`: give everything back.
_HARD = 2


def release_threads() -> bool:
    """End the threads with which torch's operations compute in this thread; the next operation starts them again.

    A fork does not have these threads, but its OpenMP would wait for them forever (libgomp of gcc 14, torch 2.13).

    Returns:
        Whether a fork can compute with several threads.
    """
    try:
        # Part of OpenMP 5.0. torch makes the symbols of its OpenMP global (`_load_global_deps` in torch/__init__.py).
        return bool(ctypes.CDLL(None).omp_pause_resource_all(_HARD) == 0)
    except (OSError, AttributeError):
        return False


def begin() -> None:
    """Let a new fork react to signals and end as a new process does, not as its parent."""
    # A collection would destroy objects of the parent. The destructor of a store waits for a thread that the fork does
    # not have (`~BackgroundThread` in torch/csrc/distributed/c10d/TCPStoreBackend.hpp, 2.13).
    gc.freeze()
    # The agent's handlers do not end a process that waits inside of C++.
    for name in ("SIGTERM", "SIGHUP", "SIGQUIT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The functions that the parent calls at its end, such as those that remove its files.
    atexit._clear()


def end() -> None:
    """Call the functions that wait for the end of this fork. multiprocessing does so from Python 3.13 on."""
    atexit._run_exitfuncs()
