"""What `save` adds to every format: the values that are no tensors, the place of each tensor, and a marker.

Readers hand over the bytes of the values here and get the contents back, checked against the tensors that are there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from nucleate.checkpoint.contents import Contents
from nucleate.checkpoint.files import HeldBytes
from nucleate.checkpoint.folder import FORMAT_VERSION, MARKER
from nucleate.checkpoint.readers.structure import Structure
from nucleate.checkpoint.readers.torch_archive import ZipTorchArchive
from nucleate.checkpoint.stored import StoredTensor
from nucleate.checkpoint.tree import key_of
from nucleate.checkpoint.values import VALUES
from nucleate.errors import CheckpointError, name_list

__all__ = ["VALUES", "check_marker", "check_version", "contents_of"]


def contents_of(
    path: Path, format: str, tensors: dict[str, StoredTensor], values: bytes, notes: dict[str, str] | None = None
) -> Contents:
    """Return the contents of a checkpoint that `save` wrote.

    Args:
        path: The file or folder.
        format: The reader's name.
        tensors: What is there, by key.
        values: What `values.encode` made of everything else.
        notes: See `Contents`.

    Raises:
        CheckpointError: The values are damaged, or tensors are missing.
    """
    held = HeldBytes(f"{VALUES} in {path}", torch.frombuffer(bytearray(values or b"\0"), dtype=torch.uint8))
    structure = Structure()
    found: Any = structure.skeleton(ZipTorchArchive(held))
    try:
        if structure.tensors:
            raise TypeError("there are tensors among them")
        skeleton, keys, sharded = found["skeleton"], found["keys"], found["sharded"]
        # Folders of version 1 do not tell.
        modules = tuple(tuple(place) for place in found.get("modules", ()))
        right = (
            isinstance(skeleton, dict)
            and all(isinstance(place, tuple) and isinstance(key, str) for place, key in keys.items())
            and all(type(dim) is int for dims in sharded.values() for dim in dims)
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"the values in {path} are damaged: {type(error).__name__}: {error}.") from error
    if not right:
        raise CheckpointError(f"the values in {path} are damaged: they are not what `save` writes.")
    lost = [f"{key} ({key_of(place)})" for place, key in keys.items() if key not in tensors]
    if lost:
        raise CheckpointError(f"{path} is damaged: it lacks {name_list(lost)}. Copy it again.")
    # False where it was converted from what others wrote.
    is_complete = found.get("is_complete", True) is True
    return Contents(path, format, tensors, skeleton, keys, modules, sharded, is_complete, notes or {})


def check_marker(folder: Path) -> bool:
    """Return whether `save` wrote the folder.

    Raises:
        CheckpointError: A newer nucleate did, or the marker is damaged.
    """
    marker = folder / MARKER
    if not marker.exists():
        return False
    try:
        with open(marker, "rb") as file:
            version = json.loads(file.read(1 << 20).decode("utf-8"))["version"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{marker} cannot be read: {type(error).__name__}: {error}") from error
    check_version(version, folder)
    return True


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
