"""The start method of a strategy: the way in which `Runtime(devices=N)` starts processes; see `process_start.py`."""

from __future__ import annotations

from nucleate.errors import ConfigurationError

#: `"popen"` runs the script again. The others are multiprocessing's, and run a function.
START_METHODS = ("popen", "spawn", "fork", "forkserver")


def checked_start_method(value: str | None) -> str | None:
    """Return a strategy's start method.

    Args:
        value: None chooses for each launch.

    Raises:
        ConfigurationError: There is no such start method.
    """
    if value is not None and value not in START_METHODS:
        allowed = ", ".join(map(repr, START_METHODS))
        raise ConfigurationError(f"start_method={value!r} is not a start method. It may be None, {allowed}.")
    return value
