"""A series of checkpoints in one folder: the pointer to the newest, and the deletion of the oldest.

[Note: Series]
The file `latest` lists the checkpoints beside it that were saved with `keep_last`, in JSON, oldest first. Each has a
mark, which distinguishes it from any later checkpoint of the same name. The file is replaced in one step. A save first
lists its whole checkpoint, then deletes the checkpoints that are too old, and last removes them from the list. So after
a kill at any moment, the next save finds every leftover. A save never deletes a checkpoint that is not listed or has
another mark.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nucleate.checkpoint.disk.folder import MARKER, CheckpointFolder, is_checkpoint, neighbours, owned
from nucleate.checkpoint.disk.lock import SaveLock
from nucleate.checkpoint.disk.single_file import CheckpointFile
from nucleate.checkpoint.disk.target import delete, discard, sync
from nucleate.errors import CheckpointError, CheckpointNotFoundError, ConfigurationError, name_list

POINTER = "latest"
_FORMAT = "nucleate latest"
_VERSION = 1
# A pointer is small: a larger file of that name is not a pointer.
_MAX_POINTER_BYTES = 16 << 20


def check_keep_last(keep_last: object) -> int | None:
    """Return the number of checkpoints to keep; None keeps all.

    Raises:
        ConfigurationError: `keep_last` is neither an integer of at least 1 nor `"all"`.
    """
    if keep_last == "all":
        return None
    if isinstance(keep_last, bool) or not isinstance(keep_last, int) or keep_last < 1:
        raise ConfigurationError(f"keep_last={keep_last!r} must be a number of at least 1, or 'all'.")
    return keep_last


@dataclass(frozen=True)
class Series:
    """The checkpoints that one pointer lists; see [Note: Series].

    Attributes:
        pointer: The file that lists them.
        keep_last: The number of checkpoints to keep; None keeps all.
    """

    pointer: Path
    keep_last: int | None

    @classmethod
    def beside(cls, path: Path, keep_last: int | None) -> Series:
        """Return the series that a checkpoint at `path` belongs to.

        Raises:
            ConfigurationError: The checkpoint would have the pointer's name.
            CheckpointError: Something else has the pointer's name.
        """
        pointer = path.with_name(POINTER)
        if path == pointer:
            raise ConfigurationError(
                f"with keep_last, {pointer} leads to the newest checkpoint, so no checkpoint can have that name. Save "
                f"to a path such as {path.with_name('step-100')}."
            )
        if os.path.lexists(pointer) and _read(pointer) is None:
            raise CheckpointError(
                f"keep_last keeps its list in {pointer}, but something else has that name. Move it elsewhere."
            )
        return cls(pointer, keep_last)

    def add(self, path: Path) -> None:
        """List a new checkpoint as the newest, and delete those that are too old.

        Args:
            path: A whole checkpoint beside the pointer.

        Raises:
            CheckpointError: The list cannot be written, or a checkpoint cannot be deleted. The new checkpoint is whole.
        """
        try:
            lock = SaveLock(self.pointer, wait=True)
        except OSError as error:
            raise CheckpointError(f"{self.pointer} cannot be written: {error}") from error
        try:
            self._add(path)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint {path} is saved, but the series in {self.pointer} could not be updated: {error}"
            ) from error
        finally:
            lock.release()

    def _add(self, path: Path) -> None:
        for leftover in self.pointer.parent.glob(f".{POINTER}.draft-*"):
            discard(leftover)
        marks = {name: mark for name, mark in (_read(self.pointer) or {}).items() if name != path.name}
        marks[path.name] = _mark(path) or ""
        self._write(marks)
        if self.keep_last is None or len(marks) <= self.keep_last:
            return
        for name in list(marks)[: -self.keep_last]:
            if self._drop(self.pointer.with_name(name), marks[name]):
                del marks[name]
        self._write(marks)

    def _drop(self, path: Path, mark: str) -> bool:
        """Delete one checkpoint if it has the listed mark, and return whether to remove it from the list."""
        try:
            lock = SaveLock(path)
        except CheckpointError:
            return False  # Another save replaces this checkpoint, and lists it.
        try:
            found = _mark(path)
            if found is not None and found != mark:
                return True
            folder = CheckpointFolder(path)
            folder.sweep()
            if found is None:
                return True
            doomed = folder.fresh()
            if path.is_dir() and set(owned(path)) != {item.name for item in path.iterdir()}:
                # The folder also holds files that nucleate did not write: they stay.
                for name in owned(path):
                    delete(path / name)
                return True
            os.rename(path, doomed)
            delete(doomed)
            return True
        finally:
            lock.release()

    def _write(self, marks: dict[str, str]) -> None:
        file = CheckpointFile(self.pointer)
        draft = file.fresh()
        listed = [{"name": name, "mark": mark} for name, mark in marks.items()]
        text = json.dumps({"format": _FORMAT, "version": _VERSION, "checkpoints": listed}, indent=2) + "\n"
        try:
            with open(draft, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(draft, self.pointer)
        finally:
            discard(draft)
        sync(self.pointer.parent)


def resolve(path: str | os.PathLike[str]) -> Path:
    """Return the file or folder to read for a path that a user gave.

    A pointer (`runs/latest`) stands for the newest whole checkpoint that it lists. If a save was killed between two
    renames, the folder is found under its other name; see [Note: Whole or absent]. Nothing is changed.

    Raises:
        CheckpointNotFoundError: There is nothing at that path, or all checkpoints that a pointer lists are gone.
    """
    absolute = Path(path).resolve()
    if absolute.is_file():
        marks = _read(absolute)
        if marks is None:
            return absolute
        for name in reversed(marks):
            for candidate in _candidates(absolute.with_name(name)):
                if candidate.is_file() or is_checkpoint(candidate):
                    return candidate
        raise CheckpointNotFoundError(
            f"{absolute} lists {name_list(marks) or 'nothing'}, but none of these is there as a whole checkpoint."
            f"{neighbours(absolute)}"
        )
    for candidate in _candidates(absolute):
        if is_checkpoint(candidate):
            return candidate
    if absolute.exists():
        return absolute
    raise CheckpointNotFoundError(f"there is no checkpoint at {absolute}: nothing has that name.{neighbours(absolute)}")


def _candidates(path: Path) -> Iterator[Path]:
    yield path
    if path.name:
        yield CheckpointFolder(path).previous


def _mark(path: Path) -> str | None:
    """Return the mark that distinguishes a checkpoint from others of the same name; None without a checkpoint."""
    try:
        status = os.stat(path / MARKER if path.is_dir() else path)
        if path.is_dir():
            return str(json.loads((path / MARKER).read_text(encoding="utf-8"))["id"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
    return f"{status.st_size} bytes of {status.st_mtime_ns}"


def _read(pointer: Path) -> dict[str, str] | None:
    """Return a pointer's list, name to mark, oldest first; None if the file is not a pointer."""
    try:
        if not pointer.is_file() or pointer.stat().st_size > _MAX_POINTER_BYTES:
            return None
        with open(pointer, "rb") as file:
            if not file.read(64).lstrip().startswith(b"{"):
                return None
        text = json.loads(pointer.read_text(encoding="utf-8"))
        if text["format"] != _FORMAT:
            return None
        listed = {str(item["name"]): str(item["mark"]) for item in text["checkpoints"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    # Only names beside the pointer: a list must not lead out of its folder.
    return {name: mark for name, mark in listed.items() if name and Path(name).name == name and name != ".."}
