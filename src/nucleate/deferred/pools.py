"""Thread pools that were there before a recording: what a constructor hands to one is recorded too."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from nucleate.deferred.active import active_records


def install_pools(stack: ExitStack) -> None:
    """Patch what hands calls to a pool until the stack is closed."""
    submit = ThreadPoolExecutor.submit
    stack.callback(setattr, ThreadPoolExecutor, "submit", submit)

    def followed_submit(pool: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return submit(pool, _followed(fn), *args, **kwargs)

    ThreadPoolExecutor.submit = followed_submit  # type: ignore[method-assign,assignment]


def _followed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that, in whichever thread it runs, records into what this thread records into."""
    records = [(record, record.recorder.makes_real) for record in active_records()]
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
