"""A checkpoint's folder on disk: whole or absent, whatever moment a save is killed at.

This file decides the names, the order of renames and what may be overwritten. What the files hold is decided
in `dcp` and `index`.

[Note: Whole or absent]
A save writes into a fresh sibling, the draft. When everything is on disk, the old checkpoint steps aside to
`.NAME.previous`, the draft takes its name, and the old one is deleted. So at every moment either NAME is a
whole checkpoint, or NAME is absent and `.NAME.previous` is one, or there was none before. Readers look at both
and change nothing; the next save tidies up.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from nucleate.errors import CheckpointError, CheckpointNotFoundError, name_list

#: Says that a folder is ours; written before the draft takes its name.
MARKER = "nucleate.json"
#: DCP's own index, written last by it.
METADATA = ".metadata"


@dataclass(frozen=True)
class CheckpointFolder:
    """Where one checkpoint is, or will be.

    Attributes:
        path: Its place; absolute, without symbolic links.
    """

    path: Path

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> CheckpointFolder:
        """Return the folder at `path`, which need not exist.

        Raises:
            CheckpointError: `path` is the root of the file system.
        """
        resolved = Path(path).resolve()
        if not resolved.name:
            raise CheckpointError(
                f"{resolved} cannot be a checkpoint; give a folder below it, such as {resolved / 'last'}."
            )
        return cls(resolved)

    @property
    def previous(self) -> Path:
        """Where the old checkpoint waits while a new one takes its name."""
        return self.path.with_name(f".{self.path.name}.previous")

    def locate(self) -> Path:
        """Return the folder that holds the last whole checkpoint.

        Raises:
            CheckpointNotFoundError: There is none.
        """
        for candidate in (self.path, self.previous):
            if _is_checkpoint(candidate):
                return candidate
        if not self.path.exists():
            raise CheckpointNotFoundError(
                f"there is no checkpoint at {self.path}: nothing has that name.{self._neighbours()}"
            )
        what = "a folder without" if self.path.is_dir() else "a file; a checkpoint is a folder with"
        raise CheckpointNotFoundError(
            f"there is no checkpoint at {self.path}: it is {what} {MARKER} and {METADATA}. Give the path that was "
            "given to `save`."
        )

    def draft(self) -> Path:
        """Tidy up after a killed save, and make an empty folder to write the next checkpoint into.

        Raises:
            CheckpointError: Something is in the way that is not a checkpoint, or it cannot be written there.
        """
        self._refuse_others()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if _is_checkpoint(self.previous):
                if _is_checkpoint(self.path):
                    self._delete(self.previous)
                else:
                    os.rename(self.previous, self.path)
            for leftover in self.path.parent.glob(f".{_escape(self.path.name)}.draft-*"):
                shutil.rmtree(leftover)
            draft = self._fresh()
            draft.mkdir()
        except OSError as error:
            raise CheckpointError(f"a checkpoint cannot be written to {self.path}: {error}") from error
        return draft

    def commit(self, draft: Path) -> None:
        """Give a finished draft the checkpoint's name; see [Note: Whole or absent].

        Args:
            draft: What `draft` returned, with every file in it already on disk.

        Raises:
            CheckpointError: Something that is not a checkpoint got in the way meanwhile.
        """
        self._refuse_others()
        _sync(draft)
        replaces = _is_checkpoint(self.path)
        if replaces:
            os.rename(self.path, self.previous)
        try:
            os.rename(draft, self.path)
        except OSError:
            if replaces:
                os.rename(self.previous, self.path)
            raise
        _sync(self.path.parent)
        if replaces:
            self._delete(self.previous)

    def _refuse_others(self) -> None:
        """Raise if what is at the path is anything but a checkpoint or an empty folder."""
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(
                f"{self.path} is a file; a checkpoint is a folder. Give another path, or delete the file."
            )
        if not self.path.is_dir():
            return
        names = sorted(item.name for item in self.path.iterdir())
        if names and not _is_checkpoint(self.path):
            raise CheckpointError(
                f"{self.path} is not a nucleate checkpoint and will not be overwritten: it holds {name_list(names)} "
                f"and no {MARKER}. Give a path of its own, such as {self.path / 'checkpoint'}."
            )
        foreign = [name for name in names if name not in (MARKER, METADATA) and not name.endswith(".distcp")]
        if foreign:
            raise CheckpointError(
                f"the checkpoint at {self.path} will not be overwritten: somebody put {name_list(foreign)} into it, "
                "which would be lost. Move that elsewhere, or save to another path."
            )

    def _delete(self, folder: Path) -> None:
        # Under a draft's name first, so that a kill halfway leaves no damaged checkpoint, only a leftover.
        doomed = self._fresh()
        os.rename(folder, doomed)
        shutil.rmtree(doomed)

    def _fresh(self) -> Path:
        return self.path.with_name(f".{self.path.name}.draft-{uuid.uuid4().hex[:8]}")

    def _neighbours(self) -> str:
        """Return a sentence with the checkpoints next to the path."""
        parent = self.path.parent
        if not parent.is_dir():
            return f" There is no folder {parent} either."
        found = sorted(item.name for item in parent.iterdir() if not item.name.startswith(".") and _is_checkpoint(item))
        return f" Checkpoints in {parent}: {name_list(found)}." if found else f" There are no checkpoints in {parent}."


def discard(draft: Path) -> None:
    """Delete a draft that will not become a checkpoint; what cannot be deleted is left to the next save."""
    shutil.rmtree(draft, ignore_errors=True)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / MARKER).is_file() and (folder / METADATA).is_file()


def _escape(name: str) -> str:
    """Return `name` as a glob pattern that matches only itself."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _sync(folder: Path) -> None:
    """Put the names in `folder` on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no such thing for folders; they keep their own order.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
