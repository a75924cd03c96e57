"""Targets on disk: the name that a save gives to its finished draft, for files and for folders."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nucleate.errors import CheckpointError

T = TypeVar("T", bound="CheckpointTarget")


@dataclass(frozen=True)
class CheckpointTarget(ABC):
    """The place of one checkpoint, which need not exist yet.

    Attributes:
        path: The path; absolute, without symbolic links.
    """

    path: Path

    @classmethod
    def at(cls: type[T], path: str | os.PathLike[str]) -> T:
        """Return the target at `path`, which need not exist.

        Raises:
            CheckpointError: `path` is the root of the file system.
        """
        resolved = Path(path).resolve()
        if not resolved.name:
            raise CheckpointError(
                f"{resolved} cannot be a checkpoint; give a name below it, such as {resolved / 'last'}."
            )
        return cls(resolved)

    @abstractmethod
    def draft(self) -> Path:
        """Tidy up after a killed save, and return the draft's path for the next checkpoint.

        The caller holds the lock on the name (`SaveLock`).

        Raises:
            CheckpointError: Something other than a checkpoint is in the way, or the place cannot be written.
        """

    def finish(self, draft: Path, format: str, world_size: int) -> None:
        """Add to a written draft what tells that `save` wrote it, where its writer has not. Does nothing by default.

        Args:
            draft: What `draft` returned.
            format: The name of its format.
            world_size: By how many ranks it was written.

        Raises:
            CheckpointError: The disk failed.
        """

    @abstractmethod
    def commit(self, draft: Path) -> None:
        """Give a finished draft the checkpoint's name.

        Args:
            draft: The result of `draft`, with all its data already on disk.

        Raises:
            CheckpointError: Something other than a checkpoint got in the way meanwhile, or the disk failed.
        """

    def make_parent(self) -> None:
        """Make the folder for the checkpoint.

        Raises:
            CheckpointError: The folder cannot be made.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.failure(error) from error

    def failure(self, error: OSError) -> CheckpointError:
        """Return the error to raise after an error of the system."""
        return CheckpointError(f"a checkpoint cannot be written to {self.path}: {error}")

    def sweep(self) -> None:
        """Delete the drafts of killed saves."""
        for leftover in self.path.parent.glob(f".{_escape(self.path.name)}.draft-*"):
            delete(leftover)

    def fresh(self) -> Path:
        """Return an unused hidden name beside the path."""
        return self.path.with_name(f".{self.path.name}.draft-{uuid.uuid4().hex[:8]}")


def delete(path: Path) -> None:
    """Delete a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(draft: Path) -> None:
    """Delete a draft that will not become a checkpoint. The next save deletes the rest if this fails."""
    try:
        delete(draft)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)


def sync(folder: Path) -> None:
    """Write the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do this for folders; they keep their own order.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _escape(name: str) -> str:
    """Return `name` as a glob pattern that matches only itself."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
