"""Marks of saves: a mark shows whether two looks at a path found the same save."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from nucleate.checkpoint.disk.folder import MARKER, METADATA

# The endings of the files that other libraries replace last, or that list all other files.
_INDEXES = (METADATA, ".index.json")


class SaveMark(NamedTuple):
    """The mark of the save at a path.

    Attributes:
        id: The id that `save` gave the folder; empty for all other files and folders.
        machine: The name of this machine. The files' statuses are comparable only on one machine.
        statuses: The status of the file, or of the folder and its indexes.
    """

    id: str
    machine: str
    statuses: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, place: Path) -> SaveMark | None:
        """Return the mark of the save at `place`, or None if nothing can be read there."""
        try:
            status = os.stat(place)
            if not stat.S_ISDIR(status.st_mode):
                return cls("", os.uname().nodename, ((status.st_dev, status.st_ino, *_written(status)),))
            try:
                found = saved_id(place)
            except (OSError, ValueError, KeyError, TypeError):
                found = ""
            # The folder's own time changes with every file that somebody puts into it.
            statuses: list[tuple[int, ...]] = [(status.st_dev, status.st_ino)]
            if not found:
                statuses += _indexes(place)
            return cls(found, os.uname().nodename, tuple(statuses))
        except (OSError, ValueError):
            return None

    def is_other(self, other: SaveMark) -> bool:
        """Return whether two marks surely belong to different saves."""
        if self.id or other.id:
            return self.id != other.id
        return self.machine == other.machine and self.statuses != other.statuses


def saved_id(folder: Path) -> str:
    """Return the id that `save` gave a folder.

    Raises:
        OSError: The marker cannot be read.
        ValueError: The marker is damaged; also KeyError and TypeError.
    """
    return str(json.loads((folder / MARKER).read_text(encoding="utf-8"))["id"])


def _indexes(folder: Path) -> Iterable[tuple[int, ...]]:
    with os.scandir(folder) as items:
        found = sorted(item.name for item in items if item.name.endswith(_INDEXES) or item.name == MARKER)
    for name in found:
        status = os.stat(folder / name)
        yield (status.st_dev, status.st_ino, *_written(status))


def _written(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
