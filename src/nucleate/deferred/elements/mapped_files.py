"""Mapped files: the file that a tensor's memory belongs to, and the check that nobody has changed that file.

A tensor of `safetensors` or of `torch.load(mmap=True)` lies in the pages of a file. Its version counter does not count
writes to the file, so the file itself is watched. The system lists the mappings of a process in `/proc/self/maps`
(proc(5)). On systems without this list, no file is watched.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nucleate.errors import CheckpointError


class FileMark:
    """A file as it was when nucleate first saw a tensor in its pages. It stays open, so that a rename does not matter.

    Args:
        path: The file's path.

    Raises:
        OSError: The file does not exist or cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self._status = os.fstat(self._descriptor)

    @property
    def inode(self) -> int:
        """The file's number in its file system."""
        return self._status.st_ino

    @property
    def size_bytes(self) -> int:
        """The size of the file in bytes."""
        return self._status.st_size

    def check(self) -> None:
        """Make sure that nobody has written to the file. A deleted file keeps its content until it is unmapped.

        Raises:
            CheckpointError: The file was written to, or another file has its name.
        """
        now = os.fstat(self._descriptor)
        if (now.st_size, now.st_mtime_ns) != (self._status.st_size, self._status.st_mtime_ns):
            raise CheckpointError(f"{self.path} was written to since it was loaded")
        try:
            named = os.stat(self.path)
        except OSError:
            return
        if (named.st_dev, named.st_ino) != (self._status.st_dev, self._status.st_ino):
            raise CheckpointError(f"{self.path} was replaced since it was loaded")


@dataclass(frozen=True, slots=True)
class FilePlace:
    """The place in a file that some memory shows.

    Attributes:
        mark: The file.
        offset: The first byte's place in the file.
    """

    mark: FileMark
    offset: int


@dataclass(slots=True)
class _Region:
    """A part of the address space that shows a part of a file.

    Attributes:
        start: The first address.
        stop: The address behind the last one.
        offset: The place of the first byte in the file.
        mark: The file.
        user: An object that keeps the region mapped as long as it lives.
    """

    start: int
    stop: int
    offset: int
    mark: FileMark
    user: weakref.ref[Any]


_known: list[_Region] = []


def place_of(address: int, size_bytes: int, user: object) -> FilePlace | None:
    """Return the place in a file of some memory of this process, or None if the memory does not belong to a file.

    Args:
        address: The first byte.
        size_bytes: The number of bytes.
        user: An object that keeps the memory alive.
    """
    _known[:] = [region for region in _known if region.user() is not None]
    region = next((r for r in _known if r.start <= address and address + size_bytes <= r.stop), None)
    if region is None:
        region = _region_of(address, size_bytes, user)
        if region is None:
            return None
        _known.append(region)
    return FilePlace(region.mark, address - region.start + region.offset)


def _region_of(address: int, size_bytes: int, user: object) -> _Region | None:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        # start-stop permissions offset device inode path
        fields = line.split(maxsplit=5)
        start, stop = (int(number, 16) for number in fields[0].split("-"))
        if stop <= address:
            continue
        # A deleted file cannot be written by its name.
        is_file = len(fields) == 6 and fields[5].startswith("/") and not fields[5].endswith(" (deleted)")
        if not is_file or start > address or address + size_bytes > stop:
            return None
        try:
            mark = FileMark(fields[5])
        except OSError:
            return None
        region = _Region(start, stop, int(fields[2], 16), mark, weakref.ref(user))
        return region if mark.inode == int(fields[4]) else None
    return None
