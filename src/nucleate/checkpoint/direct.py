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
from pathlib import Path

from nucleate.checkpoint.system_calls import function, system_call
from nucleate.cluster import Environment

#: Shorter reads are left to the page cache, which reads ahead.
MIN_DIRECT_BYTES = 256 << 10
#: So many bytes are read by one call at most.
BLOCK_BYTES = 8 << 20
# Addresses, offsets and sizes of direct reads are multiples of the disk's block; no disk's is larger.
_ALIGNMENT = 4096
# The weights and the cache together may take this part of the memory that is available.
_MEMORY_SHARE = 0.5
# What several ranks of a machine read is read from the disk once, and found in the cache by the others.
_READ_TWICE = 1.25
# How many pages of a file tell whether it is in the page cache.
_SAMPLE = 64

_kept = threading.local()


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
        self._residency = Residency(descriptor, size_bytes)

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
        if self._residency.holds(offset, min(size_bytes, BLOCK_BYTES)):
            return 0
        # What is read begins at the next aligned address, and is moved to its place: a buffer in between would cost
        # more, since the memory that is filled is in the processor's cache.
        place = _aligned(address)
        wanted = min(size_bytes - (place - address), BLOCK_BYTES) // _ALIGNMENT * _ALIGNMENT
        if offset % _ALIGNMENT or wanted <= 0:
            return self._read_edge(address, min(size_bytes, _aligned(offset + 1) - offset), offset)
        if self._pread(place, wanted, offset) != wanted:
            return 0
        if place != address:
            ctypes.memmove(address, place, wanted)
        return wanted

    def _read_edge(self, address: int, size_bytes: int, offset: int) -> int:
        """Read bytes of one block of the disk."""
        ahead = offset % _ALIGNMENT
        buffer = _buffer()
        # The last block of a file may be shorter.
        if self._pread(buffer, _ALIGNMENT, offset - ahead) < ahead + size_bytes:
            return 0
        ctypes.memmove(address, buffer + ahead, size_bytes)
        return size_bytes

    def _pread(self, address: int, size_bytes: int, offset: int) -> int:
        return system_call("pread")(self._descriptor, address, size_bytes, offset)


class Residency:
    """Which of a file's pages are in the page cache, by mincore(2).

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
        expected_bytes: How much of it this process is going to read; 0 where that is not known.
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


def _buffer() -> int:
    """Return the address of this thread's buffer for a block of the disk, which ends with the thread."""
    if not hasattr(_kept, "buffer"):
        _kept.buffer = mmap.mmap(-1, _ALIGNMENT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _kept.address = ctypes.addressof(ctypes.c_char.from_buffer(_kept.buffer))
    address: int = _kept.address
    return address
