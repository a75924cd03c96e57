"""A series of checkpoints in one folder: the pointer to the newest, and the deletion of the oldest.

[Note: Series]
The file `latest` lists the checkpoints beside it that were saved with `keep_last`, in JSON, oldest first. Each has a
mark, which distinguishes it from any later checkpoint of the same name. The file is replaced in one step. Before a save
gives its draft the checkpoint's name, it announces the checkpoint and its mark in the file. Then it lists the whole
checkpoint, deletes the checkpoints that are too old, and last removes them from the list. So after a kill at any
moment, the next save finds every checkpoint of the series and every leftover. A save never deletes a checkpoint that is
neither listed nor announced, or has another mark.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nucleate.checkpoint.disk.folder import MARKER, CheckpointFolder, is_checkpoint, neighbours, owned
from nucleate.checkpoint.disk.lock import SaveLock
from nucleate.checkpoint.disk.single_file import CheckpointFile
from nucleate.checkpoint.disk.target import delete, discard, sync
from nucleate.errors import CheckpointError, CheckpointNotFoundError, ConfigurationError, name_list, shortened

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


@dataclass
class _Listed:
    """The content of a pointer.

    Attributes:
        marks: The mark of each listed checkpoint by its name, oldest first.
        announced: The mark of each checkpoint that a save was about to commit, by its name.
    """

    marks: dict[str, str] = field(default_factory=dict)
    announced: dict[str, str] = field(default_factory=dict)


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

    def announce(self, path: Path, draft: Path) -> None:
        """Announce the checkpoint that a draft is about to become, in case that the save is killed before `add`.

        Args:
            path: The checkpoint's path, beside the pointer.
            draft: The finished draft.

        Raises:
            CheckpointError: The list cannot be written.
        """
        with self._locked():
            listed = _read(self.pointer) or _Listed()
            listed.announced[path.name] = _mark(draft) or ""
            try:
                self._write(listed)
            except OSError as error:
                raise CheckpointError(f"{self.pointer} cannot be written: {error}") from error

    def add(self, path: Path) -> None:
        """List a new checkpoint as the newest, and delete those that are too old.

        Args:
            path: A whole checkpoint beside the pointer.

        Raises:
            CheckpointError: The list cannot be written, or a checkpoint cannot be deleted. The new checkpoint is whole.
        """
        with self._locked():
            try:
                self._add(path)
            except OSError as error:
                raise CheckpointError(
                    f"the checkpoint {path} is saved, but the series in {self.pointer} could not be updated: {error}"
                ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            lock = SaveLock(self.pointer, wait=True)
        except OSError as error:
            raise CheckpointError(f"{self.pointer} cannot be written: {error}") from error
        try:
            yield
        finally:
            lock.release()

    def _add(self, path: Path) -> None:
        for leftover in self.pointer.parent.glob(f".{POINTER}.draft-*"):
            discard(leftover)
        listed = _read(self.pointer) or _Listed()
        listed.announced.pop(path.name, None)
        self._settle(listed)
        marks = listed.marks
        marks.pop(path.name, None)
        marks[path.name] = _mark(path) or ""
        self._write(listed)
        if self.keep_last is None or len(marks) <= self.keep_last:
            return
        for name in list(marks)[: -self.keep_last]:
            if self._drop(self.pointer.with_name(name), marks[name]):
                del marks[name]
        self._write(listed)

    def _settle(self, listed: _Listed) -> None:
        """List the announced checkpoints that are there, and forget those whose save was killed before."""
        for name, mark in list(listed.announced.items()):
            path = self.pointer.with_name(name)
            if _mark(path) == mark:
                listed.marks.pop(name, None)
                listed.marks[name] = mark
                del listed.announced[name]
                continue
            try:
                lock = SaveLock(path, tidies=True)
            except CheckpointError:
                continue  # This save may still run.
            lock.release()
            del listed.announced[name]

    def _drop(self, path: Path, mark: str) -> bool:
        """Delete one checkpoint if it has the listed mark, and return whether to remove it from the list."""
        try:
            lock = SaveLock(path)
        except CheckpointError:
            return False  # Another save replaces this checkpoint, and lists it.
        try:
            folder = CheckpointFolder(path)
            folder.recover()
            found = _mark(path)
            if found is not None and found != mark:
                return True
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
        except CheckpointError:
            return True  # Somebody has created something of this name. The user has to decide.
        finally:
            lock.release()

    def _write(self, listed: _Listed) -> None:
        file = CheckpointFile(self.pointer)
        draft = file.fresh()
        fields: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "checkpoints": _items(listed.marks)}
        if listed.announced:
            fields["announced"] = _items(listed.announced)
        text = json.dumps(fields, indent=2) + "\n"
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
    try:
        absolute = Path(path).resolve()
        absolute.exists()
    except (OSError, ValueError, RuntimeError) as error:
        # A link to itself (RuntimeError before Python 3.13), a zero byte, or a name that is too long.
        shown, reason = shortened(repr(os.fspath(path)), 300), shortened(str(error), 300)
        raise CheckpointNotFoundError(f"there is no checkpoint at {shown}: {reason}.") from None
    if absolute.is_file():
        listed = _read(absolute)
        if listed is None:
            return absolute
        # An announced checkpoint with its mark is whole. The save was killed before it could list it.
        announced = [name for name, mark in listed.announced.items() if _mark(absolute.with_name(name)) == mark]
        for name in (*reversed(announced), *reversed(listed.marks)):
            for candidate in _candidates(absolute.with_name(name)):
                if candidate.is_file() or is_checkpoint(candidate):
                    return candidate
        raise CheckpointNotFoundError(
            f"{absolute} lists {name_list(listed.marks) or 'nothing'}, but none of these is there as a whole "
            f"checkpoint.{neighbours(absolute)}"
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


def _read(pointer: Path) -> _Listed | None:
    """Return the content of a pointer; None if the file is not a pointer."""
    try:
        if not pointer.is_file() or pointer.stat().st_size > _MAX_POINTER_BYTES:
            return None
        with open(pointer, "rb") as file:
            if not file.read(64).lstrip().startswith(b"{"):
                return None
        text = json.loads(pointer.read_text(encoding="utf-8"))
        if text["format"] != _FORMAT:
            return None
        return _Listed(_marks_in(text["checkpoints"]), _marks_in(text.get("announced", [])))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _marks_in(items: Any) -> dict[str, str]:
    marks = {str(item["name"]): str(item["mark"]) for item in items}
    # Only names beside the pointer: a list must not lead out of its folder.
    return {name: mark for name, mark in marks.items() if name and Path(name).name == name and name != ".."}


def _items(marks: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "mark": mark} for name, mark in marks.items()]
