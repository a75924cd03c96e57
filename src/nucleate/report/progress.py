"""A progress bar around a loop, drawn by tqdm (extra `progress`).

This file decides how often a bar is drawn and where (stderr, one line on a terminal, rarely in a log file);
which rank shows one is the caller's choice, through `enabled`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from importlib import import_module
from typing import Any, Generic, TypeVar

from nucleate.errors import MissingDependencyError

T = TypeVar("T")

#: Seconds between two drawings: often on a terminal, rarely where each one adds a line to a log.
_TERMINAL_INTERVAL_S = 0.1
_LOG_INTERVAL_S = 10.0


class Progress(Generic[T]):
    """An iterable that shows how far its loop has come. Made by `progress`."""

    def __init__(self, iterable: Iterable[T], bar: Any | None) -> None:
        self._iterable = iterable
        self._bar = bar

    def __iter__(self) -> Iterator[T]:
        if self._bar is None:
            yield from self._iterable
            return
        try:
            for item in self._iterable:
                yield item
                self._bar.update()
        finally:  # also when the loop breaks or raises: what is printed next starts on its own line
            self._bar.close()

    def show(self, **values: object) -> None:
        """Show these values behind the bar from now on.

        Args:
            values: Names and values, as `show(loss="2.31", memory="1.1 GiB")`. Each call replaces the last.
        """
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)

    def print(self, text: str) -> None:
        """Print a line to stderr above the bar, without tearing it. Does nothing where no bar is shown."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)


def progress(
    iterable: Iterable[T],
    *,
    total: int | None = None,
    initial: int = 0,
    description: str = "",
    unit: str = "step",
    enabled: bool = True,
) -> Progress[T]:
    """Show a progress bar while `iterable` is consumed.

    Examples:
        >>> [n * n for n in progress(range(3), enabled=False)]
        [0, 1, 4]

    Args:
        iterable: What the loop runs over.
        total: How many items there are in all, those before `initial` included; by default `initial` plus
            the length of `iterable`, where it has one.
        initial: How many items were done before, by the run that this one resumes.
        description: What stands before the bar.
        unit: What one item is called.
        enabled: Whether there is a bar at all. Pass `runtime.is_global_zero`: one bar, not one per rank.
            Without a bar, tqdm is not needed.

    Raises:
        MissingDependencyError: tqdm is not installed.
    """
    if not enabled:
        return Progress(iterable, None)
    try:
        tqdm = import_module("tqdm").tqdm
    except ImportError as error:
        raise MissingDependencyError(
            "a progress bar needs tqdm, which is not installed. Install it with `pip install nucleate[progress]`, "
            "or pass enabled=False."
        ) from error
    if total is None and isinstance(iterable, Sized):
        total = initial + len(iterable)
    bar = tqdm(
        total=total,
        initial=initial,
        desc=description or None,
        unit=unit,
        dynamic_ncols=True,
        mininterval=_TERMINAL_INTERVAL_S if sys.stderr.isatty() else _LOG_INTERVAL_S,
    )
    return Progress(iterable, bar)
