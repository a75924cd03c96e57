"""How many bytes of a model are there already, shown while that takes longer than a second.

Off by default, so that a library call prints nothing: `Runtime` turns it on on rank 0. Drawn by tqdm (extra
`progress`); without it there is nothing to see.
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

#: What takes less is not worth a line.
DELAY_S = 1.0

_shown: ContextVar[bool] = ContextVar("shown", default=False)


@contextmanager
def metered(enabled: bool) -> Iterator[None]:
    """Show meters that are opened inside, or do not."""
    token = _shown.set(enabled)
    try:
        yield
    finally:
        _shown.reset(token)


class Meter:
    """Counts bytes, from any thread.

    Args:
        total_bytes: How many there will be.
        description: What stands before the bar.
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
        """Count bytes that are there now."""
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
        # The rate is that since the beginning, not since the bar is there.
        self._bar.start_t -= time.monotonic() - self._begin
        self._bar.update(self._done_bytes)
