"""Memory on the CPU that is about to be written for the first time: touched just ahead of the writer, and quickly.

The first touch of a page costs about as much as drawing its thousand numbers does. Here 2 MiB at a time are touched by
one call, as one huge page or as many small ones; `PagePolicy` says which.
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

# The threads that touch ahead of readers: two are quicker than one, also where they have one processor between them.
_AHEAD = 2

# linux/include/uapi/asm-generic/mman-common.h.
_MADV_POPULATE_WRITE = 23  # since Linux 5.14, an error before
_MADV_COLLAPSE = 25  # since Linux 6.1


class FreshMemory:
    """Storages that are allocated and not written yet.

    Large allocations lie one next to the other, and a huge page may then hold the end of one and the beginning of the
    next; but only if both are there when the first is advised (mm/vma.c: neighbours with other flags are not merged).

    Args:
        storages: All that are about to be filled. Small ones and those of other devices are left alone.
    """

    def __init__(self, storages: Iterable[torch.UntypedStorage]) -> None:
        self._advise = _madvise()
        large = [s for s in storages if s.device.type == "cpu" and s.nbytes() >= MIN_TOUCHED_BYTES]
        spans = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in large}) if self._advise else []
        self._firsts = [first for first, _ in spans]
        self._lasts = [last for _, last in spans]
        # Those that hold a storage's beginning. malloc has written its header there, so the system has backed a page of
        # it by a small one.
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
        """Return how much this process has touched in which kind of pages, and how long that took."""
        return self._policy.describe()

    def touch(self, place: Tensor, far_ahead: bool = False) -> None:
        """Let the system back memory by pages now. What it holds stays as it is.

        Args:
            place: Contiguous memory in one of the storages; else nothing happens.
            far_ahead: Whether it is filled later, by another thread, which is not to meet a page fault; else this
                thread is about to fill it.
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
                # Another thread may come to it at the same time, and then finds the pages there.
                self._touched.add(block)
                self._touch_block(block, number, far_ahead)

    @contextmanager
    def touched_ahead(self, places: Iterable[Tensor]) -> Iterator[None]:
        """Touch memory in threads of its own while the block runs, for writers that wait for something else.

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
        """Touch a huge page, or the part of it that is in the storage."""
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
            # The other part may be another storage's.
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
    """Return the process's policy: a machine's memory is one, so a model knows what the one before it met.

    Raises:
        ConfigurationError: The setting has another value.
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
