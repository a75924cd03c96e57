"""The choice of a save's writer and target, by the path's ending and the user's options."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import cast

from nucleate.checkpoint.disk.folder import CheckpointFolder
from nucleate.checkpoint.disk.single_file import CheckpointFile
from nucleate.checkpoint.disk.target import CheckpointTarget
from nucleate.checkpoint.writers.base import Writer
from nucleate.errors import ConfigurationError, NucleateError, name_list
from nucleate.registry import WRITERS

# The endings of the built-in writers. Reading them from the classes would import the writers.
_SUFFIXES = {"safetensors": (".safetensors",), "torch": (".pt", ".pth", ".bin", ".ckpt")}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def choose(
    path: str, format: str | None, max_shard_size: int | str, writers: Iterable[Writer] = (), one_file: bool = False
) -> tuple[Writer, CheckpointTarget]:
    """Return the writer and the target, by the path's ending and the options.

    Args:
        path: The checkpoint's path.
        format: The format of a folder, or None.
        max_shard_size: See `save`.
        writers: Further writers, which come before those that are installed under the same name or ending.
        one_file: Refuse a folder, unless the format is given.

    Raises:
        ConfigurationError: The path and the options contradict each other, or an option is invalid.
    """
    given = {writer.name: writer for writer in writers}
    installed = [*WRITERS.builtins, *(name for name in WRITERS.names() if name not in WRITERS.builtins)]
    names = [*given, *(name for name in installed if name not in given)]
    if format is not None and format not in names:
        raise ConfigurationError(f"format={format!r} must be one of {', '.join(map(repr, names))}.")
    suffix = Path(path).suffix.lower()
    implied = format_of(path, given.values())
    if one_file and implied is None and format is None:
        endings = [
            ending for found in (*(each.suffixes for each in given.values()), *_SUFFIXES.values()) for ending in found
        ]
        raise ConfigurationError(
            f"the path {path} stands for a folder, but state_dict_type='full' asks for one file. Give a path that ends "
            f"in {name_list(endings)}, or give a format."
        )
    if implied is not None and format not in (None, implied):
        raise ConfigurationError(
            f"format={format!r} contradicts the path {path}: the ending {suffix} stands for one {implied} file. Omit "
            "the format, or give a path with another ending."
        )
    max_bytes = parse_size(max_shard_size)
    name = implied or format or "dcp"
    # A copy: a save in the background may still use the writer.
    writer = copy.copy(given[name]) if name in given else cast(Writer, WRITERS.create(name))
    writer.limit_files(max_bytes)
    if implied is not None:
        return writer, CheckpointFile.at(path)
    if not writer.writes_folders:
        raise ConfigurationError(
            f"format={format!r} is one file, so the path {path} needs one of the endings {', '.join(writer.suffixes)}."
        )
    return writer, CheckpointFolder(CheckpointFolder.at(path).path, takes_along=writer.keeps_others)


def format_of(path: str, writers: Iterable[Writer] = ()) -> str | None:
    """Return the format of the file that a path's ending stands for, or None if the path stands for a folder.

    Args:
        path: The checkpoint's path.
        writers: Writers that come before the installed ones.
    """
    suffix = Path(path).suffix.lower()
    if not suffix:
        return None
    for writer in writers:
        if suffix in writer.suffixes:
            return writer.name
    builtin = next((name for name, suffixes in _SUFFIXES.items() if suffix in suffixes), None)
    if builtin is not None:
        return builtin
    for name in WRITERS.installed_names():
        # If a plugin cannot be loaded, the error names it when somebody asks for it.
        with suppress(NucleateError):
            if suffix in cast(type[Writer], WRITERS.get(name)).suffixes:
                return name
    return None


def parse_size(size: int | str) -> int:
    """Return a size in bytes.

    Args:
        size: A number of bytes, or a text such as `"5GB"` or `"500MiB"`.

    Raises:
        ConfigurationError: The size is neither, or is smaller than 1.

    Examples:
        >>> parse_size("5GB"), parse_size("1.5 KiB"), parse_size(7)
        (5000000000, 1536, 7)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size).upper())
    if isinstance(size, bool) or found is None or found[2] not in _UNITS or float(found[1]) * _UNITS[found[2]] < 1:
        raise ConfigurationError(
            f"max_shard_size={size!r} must be a number of bytes of at least 1, or a text such as '5GB' or '500MiB'."
        )
    return int(float(found[1]) * _UNITS[found[2]])
