"""A checkpoint's folder on disk: whole or absent, whatever moment a save is killed at.

This file decides the names, the order of renames and what may be overwritten. What the files hold is decided
in `writers`.

[Note: Whole or absent]
A save writes into a fresh sibling, the draft. When everything is on disk, the old checkpoint steps aside to
`.NAME.previous`, the draft takes its name, and the old one is deleted. So at every moment either NAME is a
whole checkpoint, or NAME is absent and `.NAME.previous` is one, or there was none before. Readers look at both
and change nothing; the next save tidies up.

[Note: Files of somebody else]
A folder of safetensors is Hugging Face's as well: `config.json`, tokenizers and the like lie beside the weights, before
or after they are saved. A save of that format takes such files along, by a link where the system can. Anything else
that nucleate did not write is in the way, and refused.
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

from nucleate.checkpoint.disk.target import Target, delete, discard, sync
from nucleate.errors import CheckpointError, CheckpointNotFoundError, name_list

__all__ = ["MARKER", "METADATA", "CheckpointFolder", "discard", "is_checkpoint", "write_marker"]

#: Says that a folder is ours; written before the draft takes its name.
MARKER = "nucleate.json"
#: DCP's own index, written last by it.
METADATA = ".metadata"

FORMAT_VERSION = 1

# What saves write, by what a whole checkpoint has beside the marker.
_SAFETENSORS = re.compile(
    r"nucleate\.json|nucleate\.values\.safetensors|model\.safetensors(\.index\.json)?|"
    r"model-\d{5,}-of-\d{5,}\.safetensors"
)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_DCP = re.compile(r"nucleate\.json|\.metadata|.*\.distcp")


@dataclass(frozen=True)
class CheckpointFolder(Target):
    """Where one checkpoint is, or will be.

    Attributes:
        takes_along: Whether files of somebody else are taken along; see [Note: Files of somebody else].
    """

    takes_along: bool = False

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
            if is_checkpoint(candidate):
                return candidate
        if not self.path.exists():
            raise CheckpointNotFoundError(
                f"there is no checkpoint at {self.path}: nothing has that name.{neighbours(self.path)}"
            )
        what = "a folder without" if self.path.is_dir() else "a file; a checkpoint is a folder with"
        raise CheckpointNotFoundError(
            f"there is no checkpoint at {self.path}: it is {what} {MARKER} and {METADATA}. Give the path that was "
            "given to `save`."
        )

    def draft(self) -> Path:
        self._foreign()
        self.make_parent()
        try:
            self._recover()
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

    def _recover(self) -> None:
        """Finish what a save was killed in: put the old folder back, or delete it where the new one is there."""
        if not self.previous.is_dir():
            return
        if is_checkpoint(self.path):
            self._delete(self.previous)
        elif not self.path.exists() or not any(self.path.iterdir()):
            os.rename(self.previous, self.path)
        else:
            raise CheckpointError(
                f"a save to {self.path} was killed, and its last whole checkpoint is {self.previous}; but meanwhile "
                f"somebody made {self.path} anew. Move one of the two elsewhere."
            )

    def _foreign(self) -> list[str]:
        """Return the files to take along.

        Raises:
            CheckpointError: What is at the path would be lost.
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
            # What looks like ours and is not: replaced by what is written now, or read together with it.
            stuck = [name for name in foreign if _SAFETENSORS.fullmatch(name) or not (self.path / name).is_file()]
        else:
            stuck = foreign
        if not stuck:
            return foreign
        if ours is None:
            raise CheckpointError(
                f"{self.path} is not a nucleate checkpoint and will not be overwritten: it holds {name_list(stuck)} "
                f"and no {MARKER}. Give a path of its own, such as {self.path / 'checkpoint'}."
            )
        raise CheckpointError(
            f"the checkpoint at {self.path} will not be overwritten: somebody put {name_list(stuck)} into it, "
            "which would be lost. Move that elsewhere, or save to another path."
        )

    def _delete(self, folder: Path) -> None:
        # Under a draft's name first, so that a kill halfway leaves no damaged checkpoint, only a leftover.
        doomed = self.fresh()
        os.rename(folder, doomed)
        delete(doomed)


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a whole checkpoint that `save` wrote."""
    return _pattern(folder) is not None


def owned(folder: Path) -> list[str]:
    """Return the names in a folder that `save` wrote, also if some of them are gone, in the order to delete them.

    First what makes it a checkpoint, so that it is none once the first is gone; last the marker, which says what the
    folder was.
    """
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        ours = _listed(marker) or {"dcp": _DCP, "safetensors": _SAFETENSORS}[marker["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    names = [item.name for item in folder.iterdir() if ours.fullmatch(item.name)]
    return sorted(names, key=lambda name: (name == MARKER, name not in (METADATA, *_WEIGHTS), name))


def write_marker(folder: Path, format: str, world_size: int, names: Sequence[str] | None = None) -> None:
    """Write the file that says what the folder is, and put it on disk.

    Args:
        folder: A draft with all else in it.
        format: What it is written in.
        world_size: By how many ranks.
        names: The names of its files, where the format does not tell them.
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
    """Make sure that this nucleate reads a version of the format.

    Raises:
        CheckpointError: It does not.
    """
    if type(version) is not int or version < 1:
        raise CheckpointError(f"the checkpoint at {path} is damaged: it says that its version is {str(version)[:100]}.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint at {path} has format version {version}, but this nucleate reads versions up to "
            f"{FORMAT_VERSION}. Upgrade nucleate."
        )


def neighbours(path: Path) -> str:
    """Return a sentence with the checkpoints next to a path where there is none."""
    parent = path.parent
    if not parent.is_dir():
        return f" There is no folder {parent} either."
    found = sorted(item.name for item in parent.iterdir() if not item.name.startswith(".") and is_checkpoint(item))
    return f" Checkpoints in {parent}: {name_list(found)}." if found else f" There are no checkpoints in {parent}."


def _pattern(folder: Path) -> re.Pattern[str] | None:
    """Return what the names of a whole checkpoint's files look like; None where the folder is none of ours."""
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
    """Return a pattern of the names that a marker lists, or None where it lists none."""
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
