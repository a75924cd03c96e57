"""The search for the reader of a path, and the messages for a path that no reader knows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nucleate.checkpoint.disk.folder import stranded
from nucleate.checkpoint.disk.save_mark import SaveMark
from nucleate.checkpoint.readers.base import Reader
from nucleate.checkpoint.stored.contents import Contents
from nucleate.checkpoint.stored.data_file import DataFile
from nucleate.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigurationError,
    PluginConflictError,
    PluginLoadError,
    name_list,
    shortened,
)
from nucleate.registry import READERS

_READ = (
    "The known formats are safetensors files and folders of them with their index, torch files (.pt, .pth, .bin, "
    ".ckpt) and folders of them with their index, folders of torch.distributed.checkpoint, and what `save` writes"
)

_MAX_MESSAGE = 1000


class ReplacedError(CheckpointError):
    """The error for a checkpoint that another save has replaced while it was read; see [Note: One save]."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(
            f"the checkpoint at {path} was replaced while it was read. Nothing was loaded. Load it again when the save "
            "has ended."
        )


def open_checkpoint(
    path: str | os.PathLike[str],
    reader: str | Reader | None = None,
    readers: Sequence[Reader] = (),
    trusted: bool = False,
) -> Contents:
    """Return the contents of the checkpoint at `path`, read from its headers alone.

    Args:
        path: A file or folder of any format.
        reader: The name of a reader, or a reader. By default, `reader_for` chooses the reader.
        readers: Further readers; see `reader_for`.
        trusted: Let the files run code that they choose; see `Reader.trusting`.

    Raises:
        CheckpointNotFoundError: Nothing exists at `path`.
        CheckpointError: No reader knows the file or folder, it is damaged, or a save replaced it meanwhile.
        ConfigurationError: No reader has this name.
    """
    place = Path(path)
    before = SaveMark.of(place)
    try:
        contents = _read(place, reader, readers, trusted)
    except CheckpointError as error:
        if before is not None and SaveMark.of(place) != before:
            raise ReplacedError(place) from error
        raise
    files = {file for tensor in contents.tensors.values() for file in tensor.files if isinstance(file, DataFile)}
    try:
        if SaveMark.of(place) != before:
            raise ReplacedError(place)
        for file in files:
            if not file.is_unchanged():
                raise ReplacedError(place)
    except CheckpointError:
        for file in files:
            file.close()
        raise
    total_bytes = sum(file.size_bytes for file in files)
    for file in files:
        file.checkpoint_bytes = total_bytes
    return contents


def _read(place: Path, reader: str | Reader | None, readers: Sequence[Reader], trusted: bool) -> Contents:
    found = reader_for(place, reader, readers)
    found = found.trusting() if trusted else found
    try:
        return found.read(place)
    except CheckpointError as error:
        if len(str(error)) > _MAX_MESSAGE:  # A key in a damaged file may have any length.
            raise type(error)(shortened(str(error), _MAX_MESSAGE)) from None
        raise
    except OSError as error:
        raise CheckpointError(f"{error.filename or place} cannot be read: {error.strerror or error}.") from error


def reader_for(
    path: str | os.PathLike[str], name: str | Reader | None = None, readers: Sequence[Reader] = ()
) -> Reader:
    """Return the first reader that claims `path`. The function asks `readers` first, then built-in readers.

    It skips a plugin that cannot be loaded. If no other reader claims the path, the error names this plugin.

    Args:
        path: A file or folder of any format.
        name: The name of a reader, or a reader. The function then returns this reader without asking its `claims`.
        readers: Further readers. They come before installed readers of the same name.

    Raises:
        CheckpointNotFoundError: Nothing exists at `path`.
        CheckpointError: No reader claims the path, or it cannot be read.
        ConfigurationError: No reader has this name.
    """
    place = Path(path)
    try:
        exists = os.path.lexists(place)
        readable = os.access(place, os.R_OK | (os.X_OK if place.is_dir() else 0), effective_ids=True)
    except ValueError:  # a name with a zero byte
        exists = readable = False
    if not exists:
        raise CheckpointNotFoundError(f"there is no checkpoint at {place}: nothing has that name.{_neighbours(place)}")
    if not place.exists():
        raise CheckpointNotFoundError(
            f"there is no checkpoint at {place}: it is a link to {os.readlink(place)}, which does not exist."
        )
    if not readable:
        raise CheckpointError(f"{place} cannot be read: permission denied. Ask its owner, or run as another user.")
    given = {each.name: each for each in readers}
    if isinstance(name, str) and name in given:
        return given[name]
    if name is not None:
        chosen = READERS.choose(name)
        assert isinstance(chosen, Reader)
        return chosen
    for first in readers:
        if first.claims(place):
            return first
    broken: list[str] = []
    for each in [*READERS.builtins, *(other for other in READERS.names() if other not in READERS.builtins)]:
        try:
            reader = READERS.create(each)
            assert isinstance(reader, Reader)
            claims = reader.claims(place)
        except PluginConflictError:
            raise
        except Exception as error:
            if each in READERS.builtins and not isinstance(error, PluginLoadError):
                raise CheckpointError(f"{place} cannot be read: {error}.") from error
            broken.append(str(error) if isinstance(error, ConfigurationError) else f"reader {each!r}: {error!r}")
            continue
        if claims:
            return reader
    raise CheckpointError(_unknown(place) + "".join(f" ({problem})" for problem in broken))


def _unknown(place: Path) -> str:
    """Return the message for a path that no reader claims."""
    if not place.is_dir():
        kind = "a file" if place.is_file() else "a device, pipe or socket"
        return f"{place} is {kind} that no reader knows. {_READ}. Installed readers: {', '.join(READERS.names())}."
    names = sorted(item.name + "/" * item.is_dir() for item in place.iterdir())
    if not names:
        return f"{place} is an empty folder: there is no checkpoint in it. {_READ}."
    message = f"{place} is a folder without a checkpoint; it holds {name_list(names)}. {_READ}."
    inner = [name for name in names if name.endswith("/") and _holds_one(place / name)] + stranded(place)
    return message + (f" Did you mean {name_list(str(place / name) for name in inner)}?" if inner else "")


def _neighbours(place: Path) -> str:
    """Return a sentence that lists the checkpoints next to the path, for a user who mistyped a name."""
    try:
        parent = place.parent
        if not parent.is_dir():
            return f" There is no folder {parent} either."
        names = sorted({*(item.name for item in parent.iterdir() if _holds_one(item)), *stranded(parent)})
    except (OSError, ValueError):
        return ""
    return f" Checkpoints in {parent}: {name_list(names)}." if names else f" There are no checkpoints in {parent}."


def _holds_one(path: Path) -> bool:
    """Return whether a built-in reader claims `path`."""
    if path.name.startswith("."):
        return False
    try:
        readers = [READERS.create(name) for name in READERS.builtins]
        return any(isinstance(reader, Reader) and reader.claims(path) for reader in readers)
    except (OSError, PluginLoadError):
        return False
