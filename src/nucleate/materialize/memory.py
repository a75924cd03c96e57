"""Memory on the CPU that is about to be filled once: few page faults instead of many.

A page of 4 KiB costs its first touch about as much as drawing its thousand numbers does. Huge pages cost a tenth.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Iterable

import torch

#: Smaller storages gain nothing.
MIN_ADVISED_BYTES = 4 << 20

_HUGE_PAGE = 2 << 20
# linux/include/uapi/asm-generic/mman-common.h; since Linux 6.1, an error before.
_MADV_COLLAPSE = 25


def advise_huge_pages(storages: Iterable[torch.UntypedStorage]) -> None:
    """Ask the system to back memory by huge pages; where it cannot, nothing happens.

    Args:
        storages: All that are about to be filled, allocated and not written yet. Large allocations lie one next to the
            other, and a huge page may then hold the end of one and the beginning of the next; but only if all are
            there when the first is advised (mm/vma.c: neighbours with other flags are not merged).
    """
    large = [one for one in storages if one.device.type == "cpu" and one.nbytes() >= MIN_ADVISED_BYTES]
    advise = _madvise()
    if advise is None:
        return
    for storage in large:
        first = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        advise(first, storage.data_ptr() + storage.nbytes() - first, mmap.MADV_HUGEPAGE)
    for storage in large:
        # malloc has written its header to the first page, so the system has backed this one stretch by small pages.
        advise(storage.data_ptr() // _HUGE_PAGE * _HUGE_PAGE, _HUGE_PAGE, _MADV_COLLAPSE)


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
