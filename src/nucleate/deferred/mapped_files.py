"""Mapped files: which file a tensor's memory belongs to, and whether that file has changed since.

A tensor of `safetensors` or of `torch.load(mmap=True)` lies in the pages of a file. Its version counter says nothing
about a write to the file, so the file itself is watched. The system lists the mappings of a process in
`/proc/self/maps` (proc(5)); where there is no such list, no file is watched.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nucleate.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class FileMark:
    """A file as it was when a tensor in its pages was met.

    Attributes:
        path: Where it is.
        identity: Device, inode, size in bytes and time of the last write in nanoseconds.
    """

    path: str
    identity: tuple[int, int, int, int]

    @classmethod
    def of(cls, path: str) -> FileMark | None:
        """Return the mark of the file at `path`, or None if there is none."""
        try:
            status = os.stat(path)
        except OSError:
            return None
        return cls(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))

    def check(self) -> None:
        """Make sure that the file is as it was. A file that was deleted is, until it is unmapped.

        Raises:
            CheckpointError: It was replaced or written to.
        """
        now = FileMark.of(self.path)
        if now is not None and now != self:
            replaced = now.identity[:2] != self.identity[:2]
            raise CheckpointError(f"{self.path} was {'replaced' if replaced else 'written to'} since it was loaded")


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a file some memory lies.

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
        user: As long as this object lives, the region stays mapped.
    """

    start: int
    stop: int
    offset: int
    mark: FileMark
    user: weakref.ref[Any]


_known: list[_Region] = []


def place_of(address: int, size_bytes: int, user: object) -> Place | None:
    """Return where in a file some memory of this process lies, or None if it belongs to no file.

    Args:
        address: The first byte.
        size_bytes: How many bytes there are.
        user: An object that keeps the memory alive.
    """
    _known[:] = [region for region in _known if region.user() is not None]
    region = _find(_known, address, size_bytes)
    if region is None:
        region = _find(_read_regions(user), address, size_bytes)
        if region is None:
            return None
        _known.append(region)
    return Place(region.mark, address - region.start + region.offset)


def _find(regions: list[_Region], address: int, size_bytes: int) -> _Region | None:
    return next((r for r in regions if r.start <= address and address + size_bytes <= r.stop), None)


def _read_regions(user: object) -> list[_Region]:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        # start-stop permissions offset device inode path
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or not fields[5].startswith("/") or fields[5].endswith(" (deleted)"):
            continue  # What was deleted cannot be written by its name.
        mark = FileMark.of(fields[5])
        if mark is not None and mark.identity[1] == int(fields[4]):
            start, _, stop = fields[0].partition("-")
            found.append(_Region(int(start, 16), int(stop, 16), int(fields[2], 16), mark, weakref.ref(user)))
    return found
