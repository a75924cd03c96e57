"""Fresh memory on the CPU, which is touched quickly, just before its first write.

The first touch of a page takes about as long as drawing the thousand numbers in the page. Here one call touches 2 MiB,
as one huge page or as many small pages; `PagePolicy` chooses.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nucleate.cluster.settings import huge_pages
from nucleate.materialize.pages import STRETCH_BYTES, PagePolicy

#: Smaller storages gain nothing.
MIN_TOUCHED_BYTES = 4 << 20

# The number of threads that touch ahead of readers. Two are quicker than one, also where they share one processor.
_AHEAD = 2

# linux/include/uapi/asm-generic/mman-common.h.
_MADV_POPULATE_WRITE = 23  # since Linux 5.14, an error before
_MADV_COLLAPSE = 25  # since Linux 6.1


class FreshMemory:
    """Storages that are allocated and not written yet.

    Large allocations are adjacent, and a huge page may then hold the end of one and the beginning of the next. This
    needs both allocations before the first is advised (mm/vma.c: neighbours with other flags are not merged).

    Args:
        storages: All storages that are about to be filled. Small ones and those of other devices are ignored.
    """

    def __init__(self, storages: Iterable[torch.UntypedStorage]) -> None:
        self._advise = _madvise()
        large = [s for s in storages if s.device.type == "cpu" and s.nbytes() >= MIN_TOUCHED_BYTES]
        spans = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in large}) if self._advise else []
        self._firsts = [first for first, _ in spans]
        self._lasts = [last for _, last in spans]
        # The stretches that hold a storage's beginning. malloc has written its header there, so the system has already
        # backed the beginning by a small page.
        self._begun = {first // STRETCH_BYTES for first in self._firsts}
        self._touched: set[int] = set()
        self._policy = policy()
        self._is_huge = self._is_advised = False
        self._lock = threading.Lock()
        self._ahead = threading.Lock()
        if spans:
            self._advise_all(self._policy.is_huge)

    def __bool__(self) -> bool:
        return bool(self._firsts)

    def describe(self) -> str:
        """Return a text with the memory that this process has touched in each kind of pages, and with the times."""
        return self._policy.describe()

    def touch(self, place: Tensor, far_ahead: bool = False) -> None:
        """Let the system back memory by pages now. The contents of the memory do not change.

        Args:
            place: Contiguous memory in one of the storages. For other memory, nothing happens.
            far_ahead: Whether another thread fills the memory later and must not meet a page fault; else this thread
                is about to fill it.
        """
        if not self._firsts or not place.numel():
            return
        first = place.data_ptr()
        number = bisect_right(self._firsts, first) - 1
        if number < 0 or first >= self._lasts[number]:
            return
        last = first + place.numel() * place.element_size()
        for block in range(first // STRETCH_BYTES, -(-last // STRETCH_BYTES)):
            if block not in self._touched:
                # Another thread may touch the same stretch at the same time. It then finds the pages present.
                self._touched.add(block)
                self._touch_block(block, number, far_ahead)

    @contextmanager
    def touched_ahead(self, places: Iterable[Tensor]) -> Iterator[None]:
        """Touch memory in separate threads while the block runs, for writers that wait for something else.

        Args:
            places: Contiguous memory, in the order in which it is going to be filled.
        """
        waiting = iter(places)
        is_over = False

        def run() -> None:
            while not is_over:
                with self._ahead:
                    place = next(waiting, None)
                if place is None:
                    return
                self.touch(place, far_ahead=True)

        threads = [threading.Thread(target=run, name="nucleate-touch", daemon=True) for _ in range(_AHEAD)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            is_over = True
            for thread in threads:
                thread.join()

    def _touch_block(self, block: int, number: int, far_ahead: bool) -> None:
        """Touch one stretch of 2 MiB, or the part of the stretch that is in the storage."""
        assert self._advise is not None
        start, end = block * STRETCH_BYTES, (block + 1) * STRETCH_BYTES
        if self._policy.is_huge != self._is_huge:
            self._advise_all(self._policy.is_huge)
        is_shared = start < self._firsts[number] or end > self._lasts[number]
        if is_shared:
            if self._is_huge and block in self._begun:
                began = time.thread_time()
                if not self._advise(start, STRETCH_BYTES, _MADV_COLLAPSE):
                    self._policy.took(True, time.thread_time() - began)
                    return
            # The other part may belong to another storage, which touches it later.
            self._touched.discard(block)
            first = max(start, self._firsts[number] // mmap.PAGESIZE * mmap.PAGESIZE)
            self._advise(first, min(end, self._lasts[number]) - first, _MADV_POPULATE_WRITE)
            return
        huge = self._policy.choose(may_leave=not far_ahead)
        if huge is None:
            return
        began = time.thread_time()
        if huge != self._is_huge:
            self._advise(start, STRETCH_BYTES, _advice(huge))
        self._advise(start, STRETCH_BYTES, _MADV_POPULATE_WRITE)
        self._policy.took(huge, time.thread_time() - began)

    def _advise_all(self, huge: bool) -> None:
        assert self._advise is not None
        with self._lock:
            if self._is_advised and self._is_huge == huge:
                return
            self._is_huge, self._is_advised = huge, True
            for first, last in zip(self._firsts, self._lasts, strict=True):
                begin = first // mmap.PAGESIZE * mmap.PAGESIZE
                self._advise(begin, last - begin, _advice(huge))


@functools.cache
def policy() -> PagePolicy:
    """Return the policy of this process. All models share it, because they share the machine's memory.

    Raises:
        ConfigurationError: The setting has a value that is not allowed.
    """
    return PagePolicy(huge_pages())


def _advice(huge: bool) -> int:
    return mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE


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
