"""Progress bar around a loop, drawn by tqdm (extra `progress`).

This file decides how often and where a bar is drawn: on stderr, in one line of a terminal, and rarely in a log file.
The caller chooses the rank that shows a bar, with `enabled`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from importlib import import_module
from typing import Any, Generic, TypeVar

from nucleate.errors import MissingDependencyError

T = TypeVar("T")

#: Seconds between two drawings: few on a terminal, many in a log, where each drawing adds a line.
_TERMINAL_INTERVAL_S = 0.1
_LOG_INTERVAL_S = 10.0


class Progress(Generic[T]):
    """An iterable that shows the progress of its loop. Made by `progress`."""

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
        finally:  # also when the loop breaks or raises: the next output then starts on its own line
            self._bar.close()

    def show(self, **values: object) -> None:
        """Show these values behind the bar from now on.

        Args:
            values: Names and values, as `show(loss="2.31", memory="1.1 GiB")`. Each call replaces the last.
        """
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)

    def print(self, text: str) -> None:
        """Print a line to stderr above the bar, which stays intact. Do nothing without a bar."""
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
        iterable: The items of the loop.
        total: The number of all items, including the first `initial` ones. The default is `initial` plus the length of
            `iterable`, if it has a length.
        initial: The number of items that an earlier run has done, which this run resumes.
        description: The text before the bar.
        unit: The name of one item.
        enabled: Whether there is a bar at all. Pass `runtime.is_global_zero`: one bar, not one per rank. Without a bar,
            tqdm is not needed.

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
