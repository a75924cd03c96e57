"""The additions of `save` to every format: the values, the place of each tensor, and a marker.

A reader passes the bytes of the values to `contents_of`. The function checks them against the tensors that the reader
found, and returns the contents.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from nucleate.checkpoint.disk.folder import MARKER, check_version
from nucleate.checkpoint.readers.torch.structure import Structure
from nucleate.checkpoint.readers.torch.torch_archive import ZipTorchArchive
from nucleate.checkpoint.state.tree import key_of
from nucleate.checkpoint.state.values import VALUES, StateLayout
from nucleate.checkpoint.stored.contents import Contents
from nucleate.checkpoint.stored.data_file import HeldBytes
from nucleate.checkpoint.stored.open_folder import OpenFolder
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.errors import CheckpointError, name_list

__all__ = ["VALUES", "check_marker", "contents_of"]


def contents_of(
    path: Path, format: str, tensors: dict[str, StoredTensor], values: bytes, notes: dict[str, str] | None = None
) -> Contents:
    """Return the contents of a checkpoint that `save` wrote.

    Args:
        path: The file or folder.
        format: The reader's name.
        tensors: The tensors in the checkpoint, by key.
        values: The bytes that `StateLayout.encode` returned.
        notes: See `Contents`.

    Raises:
        CheckpointError: The values are damaged, or tensors are missing.
    """
    held = HeldBytes(f"{VALUES} in {path}", torch.frombuffer(bytearray(values or b"\0"), dtype=torch.uint8))
    structure = Structure()
    found = structure.skeleton(ZipTorchArchive(held))
    try:
        if structure.tensors:
            raise ValueError("they contain tensors")
        layout = StateLayout.from_fields(found)
    except ValueError as error:
        raise CheckpointError(f"the values in {path} are damaged: {error}.") from error
    lost = [f"{key} ({key_of(place)})" for place, key in layout.keys.items() if key not in tensors]
    if lost:
        raise CheckpointError(f"{path} is damaged: it lacks {name_list(lost)}. Copy it again.")
    return Contents(
        path,
        format,
        tensors,
        layout.skeleton,
        dict(layout.keys),
        layout.modules,
        dict(layout.sharded),
        layout.is_complete,
        notes or {},
    )


def check_marker(folder: OpenFolder) -> bool:
    """Return whether `save` wrote the folder.

    Raises:
        CheckpointError: A newer nucleate wrote the folder, or the marker is damaged.
    """
    if not folder.has(MARKER):
        return False
    try:
        file = folder.open(MARKER)
        version = json.loads(file.read(0, min(file.size_bytes, 1 << 20)).decode("utf-8"))["version"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        place = folder.path / MARKER
        raise CheckpointError(f"{place} cannot be read: {type(error).__name__}: {str(error)[:200]}") from error
    check_version(version, folder.path)
    return True
