"""The method `run` of a subclass of `Runtime`, whose call launches first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def launched_first(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that lets the runtime launch `run`, unless the runtime is launched already.

    Args:
        run: The method `run` of a subclass of `Runtime`.
    """

    @functools.wraps(run)
    def launching(runtime: Any, *args: Any, **kwargs: Any) -> Any:
        if runtime._launched:
            return run(runtime, *args, **kwargs)
        # This function and not `run`: a process that is started looks it up by its name, and finds this one.
        return runtime.launch(launching, *args, **kwargs)

    return launching
