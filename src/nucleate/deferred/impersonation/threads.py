"""Threads that work for a constructor: new threads, and those of existing pools, are recorded too.

Each thread has its own torch modes. So a thread joins the recording while it runs the constructor's work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from nucleate.deferred.active import active_records


def install_threads(stack: ExitStack) -> None:
    """Patch `Thread.start` and `ThreadPoolExecutor.submit` until the stack is closed."""
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
    """Return a function that joins the recordings of this thread, in whichever thread it runs."""
    followed = [context for record in active_records() if (context := record.followed()) is not None]
    if not followed:
        return function

    def run(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for context in followed:
                stack.enter_context(context())
            return function(*args, **kwargs)

    return run
