"""Meter of the bytes that are done, shown if the work takes longer than a second.

Meters are off by default, so that a library call prints nothing. `Runtime` turns them on on rank 0. tqdm (extra
`progress`) draws them; without tqdm nothing is shown.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

#: Shorter work is not worth a line.
DELAY_S = 1.0

_shown: ContextVar[bool] = ContextVar("shown", default=False)


@contextmanager
def metered(enabled: bool) -> Iterator[None]:
    """Show or hide the meters that are opened inside the block."""
    token = _shown.set(enabled)
    try:
        yield
    finally:
        _shown.reset(token)


class Meter:
    """A counter of bytes that any thread can add to.

    Args:
        total_bytes: The number of bytes at the end.
        description: The text before the bar.
    """

    def __init__(self, total_bytes: int, description: str) -> None:
        self._enabled = _shown.get()
        self._total_bytes = total_bytes
        self._description = description
        self._done_bytes = 0
        self._begin = time.monotonic()
        self._bar: Any | None = None
        self._lock = threading.Lock()

    def add(self, size_bytes: int) -> None:
        """Count bytes as done."""
        if not self._enabled:
            return
        with self._lock:
            self._done_bytes += size_bytes
            if self._bar is not None:
                self._bar.update(size_bytes)
            elif time.monotonic() - self._begin > DELAY_S:
                self._open()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _open(self) -> None:
        try:
            tqdm = import_module("tqdm").tqdm
        except ImportError:
            self._enabled = False
            return
        self._bar = tqdm(
            total=self._total_bytes,
            desc=self._description,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )
        # The rate counts from the beginning, not from the first drawing of the bar.
        self._bar.start_t -= time.monotonic() - self._begin
        self._bar.update(self._done_bytes)
