"""Threads that work for a constructor: those it starts, and pools that were there before, are recorded too.

torch's modes are each thread's own, so a thread joins the recording for as long as it runs the constructor's work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from nucleate.deferred.active import active_records


def install_threads(stack: ExitStack) -> None:
    """Patch what starts a thread and what hands calls to a pool until the stack is closed."""
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit
    stack.callback(setattr, threading.Thread, "start", start)
    stack.callback(setattr, ThreadPoolExecutor, "submit", submit)

    def followed_start(thread: threading.Thread) -> None:
        thread.run = _followed(thread.run)  # type: ignore[method-assign]
        start(thread)

    def followed_submit(pool: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return submit(pool, _followed(fn), *args, **kwargs)

    threading.Thread.start = followed_start  # type: ignore[method-assign,assignment]
    ThreadPoolExecutor.submit = followed_submit  # type: ignore[method-assign,assignment]


def _followed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that, in whichever thread it runs, records into what this thread records into."""
    # Where the recorder's mode is off, this thread replays, and the other one helps with that.
    modes = _get_current_dispatch_mode_stack()
    recorders = [(record, record.recorder) for record in active_records()]
    records = [(record, mode.makes_real) for record, mode in recorders if any(other is mode for other in modes)]
    if not records:
        return function

    def run(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for record, makes_real in records:
                # Not once the recording has ended, and not twice.
                if record.recorder.threads and not record.recorder.is_on:
                    stack.enter_context(record.joined(makes_real))
            return function(*args, **kwargs)

    return run
