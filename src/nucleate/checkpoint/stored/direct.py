"""Direct reads, past the system's page cache, for files that do not fit into memory beside the weights that they hold.

A buffered read takes memory twice: for the page cache and for the weights. If both fit easily, that helps: the next run
finds the files in memory. If they do not fit, each page of the cache drives out another page, and the host of a virtual
machine must first find the page. `O_DIRECT` (open(2)) reads without the cache. Bytes that are already in the cache are
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

#: The first read of at least this size starts direct reads of a file. For shorter reads, the cache reads ahead.
MIN_DIRECT_BYTES = 256 << 10
#: The most bytes that one call reads.
BLOCK_BYTES = 8 << 20
# Shorter reads go through a thread's buffer, which is filled by longer reads.
_MIN_IN_PLACE_BYTES = 2 << 20
# Addresses, offsets and sizes of direct reads must be multiples of the disk's block. No disk has a larger block.
_ALIGNMENT = 4096
# The weights and the cache together may take this part of the available memory.
_MEMORY_SHARE = 0.5
# If the ranks of a machine together read more than this multiple of a file, the file goes through the cache: one rank
# reads it from the disk, and the others find it in the cache.
_READ_TWICE = 1.25
# The number of sampled pages that decide whether a file is in the page cache.
_SAMPLE = 64

_kept = threading.local()
_numbers = count()


class DirectFile:
    """A file that is read past the page cache.

    Args:
        descriptor: The descriptor of the file, opened for reading.
        size_bytes: The length of the file.

    Raises:
        OSError: The system or the file system does not support direct reads.
    """

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        if not sys.platform.startswith("linux"):
            raise OSError("only Linux has O_DIRECT")
        # This path opens the same file, even if the file's name leads to another file by now.
        self._descriptor = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        self._closing = weakref.finalize(self, os.close, self._descriptor)
        # Otherwise, a read of cached bytes would bring the next bytes into the cache, and so on to the file's end.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._residency = Residency(descriptor, size_bytes)
        self._number = next(_numbers)

    def close(self) -> None:
        """Close the file. It cannot be read afterwards."""
        self._closing()
        self._descriptor = -1

    def read(self, address: int, size_bytes: int, offset: int) -> int:
        """Copy the first bytes of a range to memory, if the file has them and they are not in the page cache.

        Args:
            address: The address of the memory.
            size_bytes: The length of the range.
            offset: The place of the range in the file.

        Returns:
            The number of copied bytes. After 0, the caller must read the next block through the cache, which also
            reports errors.
        """
        # The bytes are read to the next aligned address and then moved to their place. A buffer in between would cost
        # more, because the final memory is already in the processor's cache.
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
        """Copy bytes from this thread's buffer, or fill the buffer first; reads in order fill it with more and more."""
        window = _window()
        if window.file != self._number or not window.first <= offset < window.last:
            first = offset // _ALIGNMENT * _ALIGNMENT
            in_order = window.file == self._number and first == window.last // _ALIGNMENT * _ALIGNMENT
            wanted = max(_aligned(offset + size_bytes) - first, 2 * (window.last - window.first) if in_order else 0)
            wanted = min(wanted, BLOCK_BYTES)
            # A single block at the end of a range does not tell whether the range is in the cache.
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
    """A test, by mincore(2), whether a file's pages are in the page cache.

    Args:
        descriptor: The descriptor of the file, opened for reading.
        size_bytes: The length of the file.

    Raises:
        OSError: The file cannot be mapped.
    """

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        # Nobody reads the mapped pages, so a file that is cut short does no harm.
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
        """Return whether at least half of a range is in the page cache."""
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
        """Return whether most of the file is in the page cache, judged by a sample."""
        step = max(1, self._size_bytes // _SAMPLE)
        found = [self.holds(offset, 1) for offset in range(0, self._size_bytes, step)]
        return 2 * sum(found) >= len(found)


def is_wanted(expected_bytes: int, file_bytes: int, checkpoint_bytes: int) -> bool:
    """Return whether a file is to be read past the page cache.

    Args:
        expected_bytes: The number of bytes that this process is going to read from the file, or 0 if it is unknown.
        file_bytes: The size of the file.
        checkpoint_bytes: The size of all files of the checkpoint together.
    """
    if Environment.detect().local_world_size * expected_bytes > _READ_TWICE * file_bytes:
        return False
    available = available_bytes()
    return available is not None and 2 * checkpoint_bytes > _MEMORY_SHARE * available


def available_bytes() -> int | None:
    """Return the memory that the machine can give without swapping, or None if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _aligned(place: int) -> int:
    return place + -place % _ALIGNMENT


class _Window:
    """The buffer of one thread, which is freed when the thread ends.

    Attributes:
        address: The address of the buffer.
        file: The number of the file whose bytes it holds.
        first: The place of the first byte in the file.
        last: The place in the file behind the last byte.
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
