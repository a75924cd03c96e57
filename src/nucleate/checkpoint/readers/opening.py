"""The search for the reader of a path, and the messages for a path that no reader knows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nucleate.checkpoint.disk.folder import stranded
from nucleate.checkpoint.disk.save_mark import SaveMark
from nucleate.checkpoint.readers.base import Reader
from nucleate.checkpoint.readers.file_kinds import FileKind, kind_of_archive, kind_of_bytes
from nucleate.checkpoint.stored.contents import Contents
from nucleate.checkpoint.stored.data_file import DataFile, first_bytes
from nucleate.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointUnreadableError,
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

# Room for the path of the file, which is up to 4,096 bytes long, comes on top of this if it is not in the message.
_MAX_MESSAGE = 900


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
    *,
    passes_over: bool = False,
) -> Contents:
    """Return the contents of the checkpoint at `path`, read from its headers alone.

    Args:
        path: A file or folder of any format.
        reader: The name of a reader, or a reader. By default, `reader_for` chooses the reader.
        readers: Further readers; see `reader_for`.
        trusted: Let the files run code that they choose; see `Reader.trusting`.
        passes_over: Leave the values that are not plain data as they are stored (`Contents.objects`), and allow a
            tensor without a name (`Contents.is_unnamed`). By default each value is made, and one that cannot be read
            without running code is an error.

    Raises:
        CheckpointNotFoundError: Nothing exists at `path`.
        CheckpointUnreadableError: No reader knows the file or folder, or a value is of a kind that cannot be read.
        CheckpointError: The file or folder is damaged, or a save replaced it meanwhile.
        ConfigurationError: No reader has this name.
    """
    place = Path(path)
    before = SaveMark.of(place)
    try:
        contents = _read(place, reader, readers, trusted)
        if not passes_over:
            contents.check_named()
            contents = contents.made()
    except CheckpointError as error:
        if before is not None and SaveMark.of(place) != before:
            raise ReplacedError(place) from error
        if (short := _short(str(error), place)) != str(error):
            raise type(error)(short) from error
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
    try:
        found = reader_for(place, reader, readers)
        found = found.trusting() if trusted else found
        return found.read(place)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{error.filename or place} cannot be read: {error.strerror or error}.") from error
    except (MemoryError, RecursionError) as error:
        raise CheckpointUnreadableError(
            f"{place} cannot be read: it asks for too much ({type(error).__name__}). It is damaged, or made to harm."
        ) from error


def _short(message: str, place: Path) -> str:
    """Return a message that a log can show: names in a file may be of any length, and hold any characters."""
    message = message.encode("utf-8", "backslashreplace").decode("utf-8")
    cut = shortened(message, _MAX_MESSAGE)
    return cut if cut == message or str(place) in cut else f"{place}: {cut}"


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
    raise CheckpointUnreadableError(_unknown(place) + "".join(f" ({problem})" for problem in broken))


def _unknown(place: Path) -> str:
    """Return the message for a path that no reader claims."""
    if not place.is_dir():
        if place.is_file() and (known := kind_of(place)) is not None:
            return f"{known.refusal(place)}"
        kind = "a file" if place.is_file() else "a device, pipe or socket"
        return f"{place} is {kind} that no reader knows. {_READ}. Installed readers: {', '.join(READERS.names())}."
    names = sorted(item.name + "/" * item.is_dir() for item in place.iterdir())
    if not names:
        return f"{place} is an empty folder: there is no checkpoint in it. {_READ}."
    message = f"{place} is a folder without a checkpoint; it holds {name_list(names)}. {_READ}."
    inner = [name for name in names if name.endswith("/") and _holds_one(place / name)] + stranded(place)
    return message + (f" Did you mean {name_list(str(place / name) for name in inner)}?" if inner else "")


def kind_of(place: Path) -> FileKind | None:
    """Return the kind of a file that no reader knows, or None."""
    start = first_bytes(place, 512)
    if not start.startswith(b"PK\x03\x04"):
        return kind_of_bytes(start)
    from nucleate.checkpoint.readers.torch.zip_directory import ZipDirectory

    try:
        file = DataFile(place)
        return kind_of_archive(ZipDirectory(file.read, file.size_bytes, file.name).names())
    except CheckpointError:
        return None


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
