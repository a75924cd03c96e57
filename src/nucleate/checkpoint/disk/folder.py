"""Checkpoint folders on disk: each is whole or absent, at whatever moment a save is killed.

This file decides the names, the order of renames, and which files a save may overwrite. `writers` decide the contents
of the files.

[Note: Whole or absent]
A save writes into a new folder beside the checkpoint, the draft. When everything is on disk, the old checkpoint is
renamed to `.NAME.previous`, the draft gets the name NAME, and the old checkpoint is deleted. So at every moment, NAME
is a whole checkpoint, or NAME is absent and `.NAME.previous` is a whole checkpoint, or there was no checkpoint before.
Readers look at both names and change nothing. The next save tidies up.

[Note: Files of somebody else]
Hugging Face's libraries also use safetensors folders: `config.json`, tokenizers and the like lie beside the weights,
before or after these are saved. A save in that format keeps such files, by a link if the system can make one. The save
refuses to replace anything else that nucleate did not write.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nucleate.checkpoint.disk.target import CheckpointTarget, delete, discard, sync
from nucleate.errors import CheckpointError, CheckpointNotFoundError, name_list

__all__ = ["MARKER", "METADATA", "CheckpointFolder", "discard", "is_checkpoint", "write_marker"]

#: The file that marks a folder as nucleate's. It is written before the draft gets the checkpoint's name.
MARKER = "nucleate.json"
#: DCP's own index, which DCP writes last.
METADATA = ".metadata"

FORMAT_VERSION = 1
_PREVIOUS = ".previous"

# The names of the files that saves write, by format. A whole checkpoint also has a file of weights or an index.
_SAFETENSORS = re.compile(
    r"nucleate\.json|nucleate\.values\.safetensors|model\.safetensors(\.index\.json)?|"
    r"model-\d{5,}-of-\d{5,}\.safetensors"
)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_DCP = re.compile(r"nucleate\.json|\.metadata|.*\.distcp")


@dataclass(frozen=True)
class CheckpointFolder(CheckpointTarget):
    """The folder of one checkpoint, which need not exist yet.

    Attributes:
        takes_along: Whether a save keeps files that nucleate did not write; see [Note: Files of somebody else].
    """

    takes_along: bool = False

    @property
    def previous(self) -> Path:
        """The path of the old checkpoint while a new one gets its name."""
        return self.path.with_name(f".{self.path.name}{_PREVIOUS}")

    def locate(self) -> Path:
        """Return the folder that holds the last whole checkpoint.

        Raises:
            CheckpointNotFoundError: There is no whole checkpoint.
        """
        for candidate in (self.path, self.previous):
            if is_checkpoint(candidate):
                return candidate
        if not self.path.exists():
            raise CheckpointNotFoundError(
                f"there is no checkpoint at {self.path}: nothing has that name.{neighbours(self.path)}"
            )
        what = "a folder without" if self.path.is_dir() else "a file; a checkpoint is a folder with"
        raise CheckpointNotFoundError(
            f"there is no checkpoint at {self.path}: it is {what} {MARKER} and {METADATA}. Pass the path that "
            "you passed to `save`."
        )

    def draft(self) -> Path:
        self._foreign()
        self.make_parent()
        try:
            self.recover()
            self.sweep()
            draft = self.fresh()
            draft.mkdir()
        except OSError as error:
            raise self.failure(error) from error
        return draft

    def finish(self, draft: Path, format: str, world_size: int) -> None:
        if os.path.lexists(draft / MARKER):
            return
        names = [item.name for item in draft.iterdir()]
        try:
            write_marker(draft, format, world_size, names)
        except OSError as error:
            raise self.failure(error) from error

    def commit(self, draft: Path) -> None:
        """Give a finished draft the checkpoint's name; see [Note: Whole or absent]."""
        foreign = self._foreign()
        try:
            for name in foreign:
                if not os.path.lexists(draft / name):
                    _take_along(self.path / name, draft / name)
            sync(draft)
            replaces = is_checkpoint(self.path) or bool(foreign)
            if replaces:
                os.rename(self.path, self.previous)
            try:
                os.rename(draft, self.path)
            except OSError:
                if replaces:
                    os.rename(self.previous, self.path)
                raise
            sync(self.path.parent)
            if replaces:
                self._delete(self.previous)
        except OSError as error:
            raise self.failure(error) from error

    def recover(self) -> None:
        """Finish a killed save: rename the old folder back, or delete it if the new checkpoint is there.

        The caller holds the lock on the name.

        Raises:
            CheckpointError: Somebody has created something of this name meanwhile.
        """
        if not self.previous.is_dir():
            return
        if is_checkpoint(self.path):
            self._delete(self.previous)
        elif not self.path.exists() or not any(self.path.iterdir()):
            os.rename(self.previous, self.path)
        else:
            raise CheckpointError(
                f"a save to {self.path} was killed, and its last whole checkpoint is {self.previous}; but then "
                f"somebody created {self.path} again. Move one of the two elsewhere."
            )

    def _foreign(self) -> list[str]:
        """Return the names of the files that nucleate did not write and that a save keeps.

        Raises:
            CheckpointError: The save would delete files that nucleate did not write.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(
                f"{self.path} is a file; a checkpoint is a folder. Give another path, or delete the file."
            )
        if not self.path.is_dir():
            return []
        names = sorted(item.name for item in self.path.iterdir())
        ours = _pattern(self.path)
        foreign = [name for name in names if ours is None or not ours.fullmatch(name)]
        if self.takes_along:
            # A foreign file with a name of ours would be replaced by the new files, or be read together with them.
            stuck = [name for name in foreign if _SAFETENSORS.fullmatch(name) or not (self.path / name).is_file()]
        else:
            stuck = foreign
        if not stuck:
            return foreign
        if ours is None:
            raise CheckpointError(
                f"{self.path} is not a nucleate checkpoint and will not be overwritten: it holds {name_list(stuck)} "
                f"and no {MARKER}. Give the path of a new folder, such as {self.path / 'checkpoint'}."
            )
        raise CheckpointError(
            f"the checkpoint at {self.path} will not be overwritten: somebody put {name_list(stuck)} into it, "
            "which would be lost. Move it elsewhere, or save to another path."
        )

    def _delete(self, folder: Path) -> None:
        # The folder first gets a draft's name, so that a kill halfway leaves only a leftover, not a damaged checkpoint.
        doomed = self.fresh()
        os.rename(folder, doomed)
        delete(doomed)


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a whole checkpoint that `save` wrote."""
    return _pattern(folder) is not None


def owned(folder: Path) -> list[str]:
    """Return the names of the files that `save` wrote into a folder, in the order to delete them.

    The folder may be incomplete. The index or the weights come first: without them the folder is not a checkpoint any
    more. The marker comes last, because it identifies the folder.
    """
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        ours = _listed(marker) or {"dcp": _DCP, "safetensors": _SAFETENSORS}[marker["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    names = [item.name for item in folder.iterdir() if ours.fullmatch(item.name)]
    return sorted(names, key=lambda name: (name == MARKER, name not in (METADATA, *_WEIGHTS), name))


def write_marker(folder: Path, format: str, world_size: int, names: Sequence[str] | None = None) -> None:
    """Write the marker, which identifies the folder, to disk.

    Args:
        folder: A draft that is otherwise complete.
        format: The name of the folder's format.
        world_size: The number of ranks that wrote the folder.
        names: The names of the folder's files, if the format does not determine them.
    """
    marker: dict[str, Any] = {
        "format": "nucleate checkpoint",
        "version": FORMAT_VERSION,
        "files": format,
        "id": uuid.uuid4().hex,
        "torch": torch.__version__,
        "world_size": world_size,
    }
    if names is not None:
        marker["names"] = sorted(names)
    with open(folder / MARKER, "w", encoding="utf-8") as file:
        file.write(json.dumps(marker, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def check_version(version: Any, path: Path) -> None:
    """Check that this nucleate reads a version of the format.

    Raises:
        CheckpointError: This nucleate does not read the version, or it is not a version.
    """
    if type(version) is not int or version < 1:
        raise CheckpointError(f"the checkpoint at {path} is damaged: its version is {str(version)[:100]}.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint at {path} has format version {version}, but this nucleate reads versions up to "
            f"{FORMAT_VERSION}. Upgrade nucleate."
        )


def neighbours(path: Path) -> str:
    """Return a sentence that lists the checkpoints next to a path without a checkpoint."""
    parent = path.parent
    if not parent.is_dir():
        return f" There is no folder {parent} either."
    whole = [item.name for item in parent.iterdir() if not item.name.startswith(".") and is_checkpoint(item)]
    found = sorted({*whole, *stranded(parent)})
    return f" Checkpoints in {parent}: {name_list(found)}." if found else f" There are no checkpoints in {parent}."


def stranded(parent: Path) -> list[str]:
    """Return the names of the checkpoints in a folder that a killed save has renamed; see [Note: Whole or absent]."""
    names = [item.name[1 : -len(_PREVIOUS)] for item in parent.glob(f".*{_PREVIOUS}")]
    folders = [CheckpointFolder(parent / name) for name in names if name]
    return sorted(each.path.name for each in folders if is_checkpoint(each.previous) and not is_checkpoint(each.path))


def _pattern(folder: Path) -> re.Pattern[str] | None:
    """Return a pattern of the file names of a whole checkpoint, or None if the folder is not a checkpoint of `save`."""
    if not (folder / MARKER).is_file():
        return None
    if (folder / METADATA).is_file():
        return _DCP
    if any((folder / name).is_file() for name in _WEIGHTS):
        return _SAFETENSORS
    try:
        return _listed(json.loads((folder / MARKER).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _listed(marker: Any) -> re.Pattern[str] | None:
    """Return a pattern of the names that a marker lists, or None if it does not list names."""
    names = marker.get("names") if isinstance(marker, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return re.compile("|".join(map(re.escape, [MARKER, *names])))


def _take_along(source: Path, target: Path) -> None:
    if source.is_symlink():
        os.symlink(os.readlink(source), target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())
