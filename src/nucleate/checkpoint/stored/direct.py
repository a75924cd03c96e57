"""Reading past the system's page cache, for files that do not fit into memory beside the weights that they hold.

A buffered read takes memory twice: for the page cache and for the weights. Where both fit easily, that is welcome: the
next run finds the files in memory. Where they do not, each page of the cache drives out another one, and in a virtual
machine has to be found by the host first. `O_DIRECT` (open(2)) reads without the cache. What is in the cache already is
read from there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import weakref
from itertools import count
from pathlib import Path

from nucleate.checkpoint.disk.system_calls import function, system_call
from nucleate.cluster import Environment

#: Files are read past the page cache from the first read of this size on. For shorter reads the cache reads ahead.
MIN_DIRECT_BYTES = 256 << 10
#: So many bytes are read by one call at most.
BLOCK_BYTES = 8 << 20
# What is shorter goes through a thread's buffer, in longer runs.
_MIN_IN_PLACE_BYTES = 2 << 20
# Addresses, offsets and sizes of direct reads are multiples of the disk's block; no disk's is larger.
_ALIGNMENT = 4096
# The weights and the cache together may take this part of the memory that is available.
_MEMORY_SHARE = 0.5
# What several ranks of a machine read is read from the disk once, and found in the cache by the others.
_READ_TWICE = 1.25
# How many pages of a file tell whether it is in the page cache.
_SAMPLE = 64

_kept = threading.local()
_numbers = count()


class DirectFile:
    """A file that is read past the page cache.

    Args:
        descriptor: Of the file, opened for reading.
        size_bytes: How long it is.

    Raises:
        OSError: The system or the file system cannot do so.
    """

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        if not sys.platform.startswith("linux"):
            raise OSError("only Linux has O_DIRECT")
        # The same file, whatever its name stands for by now.
        self._descriptor = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        weakref.finalize(self, os.close, self._descriptor)
        # Else a read of what is in the cache would bring what follows into the cache, and so on to the file's end.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._residency = Residency(descriptor, size_bytes)
        self._number = next(_numbers)

    def read(self, address: int, size_bytes: int, offset: int) -> int:
        """Copy the first bytes of a range to memory, if the file has them and they are not in the page cache.

        Args:
            address: Where they go.
            size_bytes: How long the range is.
            offset: Its place in the file.

        Returns:
            How many bytes were copied. After 0, the next block is to be read through the cache, which also tells what
            is wrong.
        """
        # What is read begins at the next aligned address, and is moved to its place: a buffer in between would cost
        # more, since the memory that is filled is in the processor's cache.
        place = _aligned(address)
        wanted = min(size_bytes - (place - address), BLOCK_BYTES) // _ALIGNMENT * _ALIGNMENT
        if offset % _ALIGNMENT:
            return self._read_window(address, min(size_bytes, _aligned(offset) - offset), offset)
        if wanted < _MIN_IN_PLACE_BYTES:
            return self._read_window(address, size_bytes, offset)
        if self._residency.holds(offset, wanted) or self._pread(place, wanted, offset) != wanted:
            return 0
        if place != address:
            ctypes.memmove(address, place, wanted)
        return wanted

    def _read_window(self, address: int, size_bytes: int, offset: int) -> int:
        """Read bytes from what this thread has read last, or read more: the more, the longer it goes on in order."""
        window = _window()
        if window.file != self._number or not window.first <= offset < window.last:
            first = offset // _ALIGNMENT * _ALIGNMENT
            in_order = window.file == self._number and first == window.last // _ALIGNMENT * _ALIGNMENT
            wanted = max(_aligned(offset + size_bytes) - first, 2 * (window.last - window.first) if in_order else 0)
            wanted = min(wanted, BLOCK_BYTES)
            # A block of the disk at the end of a range tells nothing of the range.
            if wanted > _ALIGNMENT and self._residency.holds(first, wanted):
                return 0
            window.file = -1
            found = self._pread(window.address, wanted, first)
            if found <= offset - first:
                return 0
            window.file, window.first, window.last = self._number, first, first + found
        copied = min(size_bytes, window.last - offset)
        ctypes.memmove(address, window.address + offset - window.first, copied)
        return copied

    def _pread(self, address: int, size_bytes: int, offset: int) -> int:
        return system_call("pread")(self._descriptor, address, size_bytes, offset)


class Residency:
    """Tells whether a file's pages are in the page cache, by mincore(2).

    Args:
        descriptor: Of the file, opened for reading.
        size_bytes: How long it is.

    Raises:
        OSError: It cannot be mapped.
    """

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        # Nobody looks at the pages, so a file that is cut short does no harm.
        word, number = ctypes.c_size_t, ctypes.c_int
        map_it = function("mmap", ctypes.c_void_p, ctypes.c_void_p, word, number, number, number, ctypes.c_int64)
        address = map_it(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address is None or address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "the file cannot be mapped")
        self._address: int = address
        unmap = function("munmap", number, ctypes.c_void_p, word)
        weakref.finalize(self, unmap, address, size_bytes)
        self._size_bytes = size_bytes

    def holds(self, offset: int, size_bytes: int) -> bool:
        """Return whether at least half of a range is there."""
        first = offset // mmap.PAGESIZE * mmap.PAGESIZE
        size_bytes = min(offset + size_bytes, self._size_bytes) - first
        if size_bytes <= 0:
            return True
        pages = (ctypes.c_ubyte * -(-size_bytes // mmap.PAGESIZE))()
        ask = function("mincore", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        if ask(self._address + first, size_bytes, pages):
            return True
        return 2 * sum(bytes(pages)) >= len(pages)

    def holds_most(self) -> bool:
        """Return whether most of the file is there, by a sample."""
        step = max(1, self._size_bytes // _SAMPLE)
        found = [self.holds(offset, 1) for offset in range(0, self._size_bytes, step)]
        return 2 * sum(found) >= len(found)


def is_wanted(expected_bytes: int, file_bytes: int, checkpoint_bytes: int) -> bool:
    """Return whether a file is to be read past the page cache.

    Args:
        expected_bytes: The number of bytes that this process is going to read from it, or 0 if nobody knows.
        file_bytes: How large it is.
        checkpoint_bytes: How large all files of the checkpoint are.
    """
    if Environment.detect().local_world_size * expected_bytes > _READ_TWICE * file_bytes:
        return False
    available = available_bytes()
    return available is not None and 2 * checkpoint_bytes > _MEMORY_SHARE * available


def available_bytes() -> int | None:
    """Return how much memory the machine can give without swapping, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _aligned(place: int) -> int:
    return place + -place % _ALIGNMENT


class _Window:
    """A buffer of one thread, which ends with the thread.

    Attributes:
        address: Where it is.
        file: The number of the file whose bytes it holds.
        first: The place of the first one in the file.
        last: The place behind the last one.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.file = -1
        self.first = self.last = 0


def _window() -> _Window:
    if not hasattr(_kept, "window"):
        _kept.window = _Window()
    window: _Window = _kept.window
    return window
