"""Files in the page cache: counted, taken out, and waited for."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from nucleate.checkpoint.stored.direct import Residency


def drop(path: Path) -> None:
    """Take a file out of the page cache, also what the system is just reading ahead."""
    deadline = time.monotonic() + 20
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        while cached_pages(path) and time.monotonic() < deadline:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            time.sleep(0.005)
    if cached_pages(path):
        pytest.skip("this file system keeps its files in memory")


def cached_pages(path: Path) -> int:
    """Return how many of a file's pages are in the page cache, counted page by page."""
    with open(path, "rb") as file:
        size = path.stat().st_size
        residency = Residency(file.fileno(), size)
        return sum(residency.holds(offset, 1) for offset in range(0, size, 4096))
