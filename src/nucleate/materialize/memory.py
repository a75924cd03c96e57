"""Memory on the CPU that is about to be filled once: few page faults instead of many."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import torch

#: Smaller storages gain nothing.
MIN_ADVISED_BYTES = 4 << 20

_HUGE_PAGE = 2 << 20


def allocate(size_bytes: int, device: torch.device) -> torch.UntypedStorage:
    """Return new memory with nothing in it."""
    storage = torch.UntypedStorage(size_bytes, device=device)
    advise_huge_pages(storage)
    return storage


def advise_huge_pages(storage: torch.UntypedStorage) -> None:
    """Ask the system to back untouched memory by huge pages; where it cannot, nothing happens.

    A page of 4 KiB costs its first touch about as much as drawing its thousand numbers does.
    """
    if storage.device.type != "cpu" or storage.nbytes() < MIN_ADVISED_BYTES:
        return
    advise = _madvise()
    if advise is None:
        return
    # Whole huge pages inside the memory only: nothing beyond it is taken.
    first = -(-storage.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    last = (storage.data_ptr() + storage.nbytes()) // _HUGE_PAGE * _HUGE_PAGE
    if first < last:
        advise(first, last - first, mmap.MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    result: Callable[[int, int, int], int] = function
    return result
