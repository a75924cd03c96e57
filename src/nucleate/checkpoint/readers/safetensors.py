"""The reader of safetensors: one file, or a folder with shards, as Hugging Face, torch and `save` write them."""

from __future__ import annotations

import binascii
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch

from nucleate.checkpoint.disk.folder import METADATA
from nucleate.checkpoint.readers.base import Reader
from nucleate.checkpoint.readers.safetensors_file import MAX_HEADER_BYTES, SafetensorsFile
from nucleate.checkpoint.readers.saved import VALUES, check_marker, contents_of
from nucleate.checkpoint.readers.shard_index import ShardIndex, indexes_among
from nucleate.checkpoint.readers.strict_json import are_sizes, parse
from nucleate.checkpoint.stored.chunk import Chunk
from nucleate.checkpoint.stored.contents import Contents
from nucleate.checkpoint.stored.data_file import DataFile, first_bytes
from nucleate.checkpoint.stored.open_folder import OpenFolder
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.errors import CheckpointError, name_list

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
#: The usual name of a folder's model file, as Hugging Face names it.
USUAL_NAME = "model.safetensors"
#: The file for the values, which `save` writes besides the shards.
VALUES_FILE = "nucleate.values.safetensors"
#: The metadata entry of a single file that holds the values, as base64.
VALUES_ENTRY = "nucleate"
# The metadata entry in which torch's HuggingFaceStorageWriter says which part of a tensor a file holds
# (torch/distributed/checkpoint/_hf_utils.py, 2.13).
_PARTS_ENTRY = "DCP_SHARDING_INFO"


@final
class SafetensorsReader(Reader):
    """The reader of `.safetensors` files, and of folders of them with or without an index."""

    name = "safetensors"

    def claims(self, path: Path) -> bool:
        """Claim a file with this suffix, a folder with an index or shards, and a file that begins like safetensors."""
        if path.is_dir():
            names = os.listdir(path)
            if indexes_among(names, INDEX_SUFFIX) or VALUES_FILE in names:
                return True
            return METADATA not in names and bool(_shards(names))
        if path.name.endswith((SUFFIX, INDEX_SUFFIX)):
            return True
        return not path.suffix and _begins_like_one(first_bytes(path, 9))

    def read(self, path: Path) -> Contents:
        """Read the headers of all files that belong to the checkpoint."""
        if path.name.endswith(INDEX_SUFFIX):
            with OpenFolder(path.parent) as folder:
                return self._read_folder(folder, path.name)
        if path.is_dir():
            with OpenFolder(path) as folder:
                indexes = indexes_among(folder.names(), INDEX_SUFFIX)
                if len(indexes) > 1:
                    raise CheckpointError(
                        f"{path} holds {len(indexes)} checkpoints: {name_list(indexes)}. Give the path of the one to "
                        "read."
                    )
                return self._read_folder(folder, indexes[0] if indexes else None)
        return self._read_file(path)

    def _read_file(self, path: Path) -> Contents:
        found = SafetensorsFile.read(DataFile(path))
        parts = _Parts()
        parts.add(found)
        tensors = parts.joined()
        if VALUES_ENTRY not in found.metadata:
            return Contents.flat(path, self.name, tensors, found.metadata)
        notes = {key: value for key, value in found.metadata.items() if key != VALUES_ENTRY}
        try:
            values = binascii.a2b_base64(found.metadata[VALUES_ENTRY].encode("utf-8"), strict_mode=True)
        except ValueError as error:
            raise CheckpointError(
                f"{path} is damaged: `{VALUES_ENTRY}` in its metadata is not base64 ({error}). Copy it again."
            ) from error
        return contents_of(path, self.name, tensors, values, notes)

    def _read_folder(self, folder: OpenFolder, index_name: str | None) -> Contents:
        path = folder.path
        if index_name is not None:
            tensors, notes = self._read_indexed(ShardIndex.read(folder, index_name))
        else:
            tensors, notes = self._read_unindexed(folder)
        if not folder.has(VALUES_FILE):
            if check_marker(folder):
                raise CheckpointError(f"the checkpoint at {path} is damaged: it lacks {VALUES_FILE}. Copy it again.")
            return Contents.flat(path, self.name, tensors, notes)
        check_marker(folder)
        values = SafetensorsFile.read(folder.open(VALUES_FILE)).tensors.get(VALUES)
        if values is None or values.dtype is not torch.uint8:
            raise CheckpointError(f"{path / VALUES_FILE} is damaged: it has no bytes called {VALUES}. Copy it again.")
        chunk = values.chunks[0]
        return contents_of(path, self.name, tensors, chunk.file.read(chunk.offset, values.size_bytes), notes)

    def _read_indexed(self, index: ShardIndex) -> tuple[dict[str, StoredTensor], dict[str, str]]:
        shards = {name: SafetensorsFile.read(index.open(name)) for name in index.names}
        index.compare({name: shard.tensors for name, shard in shards.items()})
        notes = _common([shard.metadata for shard in shards.values()])
        stale = [name for name in _shards(index.folder.names()) if name not in shards]
        if stale:
            notes["ignored files"] = f"{name_list(stale)}: {index.path.name} does not name them"
        return {key: shards[name].tensors[key] for key, name in index.weight_map.items()}, notes

    def _read_unindexed(self, folder: OpenFolder) -> tuple[dict[str, StoredTensor], dict[str, str]]:
        names = _shards(folder.names())
        if not names and not folder.has(VALUES_FILE):
            raise CheckpointError(f"{folder.path} holds no {SUFFIX} file and no *{INDEX_SUFFIX}.")
        usual = [name for name in names if name == USUAL_NAME]
        others = [name for name in names if usual and name != USUAL_NAME]
        names = usual or names
        shards = [SafetensorsFile.read(folder.open(name)) for name in names]
        if len(shards) > 1 and not all(_PARTS_ENTRY in shard.metadata for shard in shards):
            raise CheckpointError(
                f"{folder.path} holds {len(names)} {SUFFIX} files, but no *{INDEX_SUFFIX} that says which file holds "
                f"which tensor: {name_list(names)}. Give the path of one file, or copy the index too."
            )
        parts = _Parts()
        for shard in shards:
            parts.add(shard)
        notes = _common([shard.metadata for shard in shards])
        if others:
            notes["ignored files"] = f"{name_list(others)}: {USUAL_NAME} holds the model"
        return parts.joined(), notes


@dataclass
class _Parts:
    """Tensors whose parts may lie in several files. Each file says where its part begins."""

    _found: dict[str, list[tuple[StoredTensor, Chunk]]] = field(default_factory=dict)

    def add(self, shard: SafetensorsFile) -> None:
        """Add the tensors, or parts of tensors, of a file."""
        parts = _places(shard)
        for key, tensor in shard.tensors.items():
            begin = parts.get(key, (0,) * len(tensor.shape))
            if len(begin) != len(tensor.shape):
                raise CheckpointError(
                    f"{shard.file.name} is damaged: its part of {key} has the shape {tensor.shape}, but its metadata "
                    f"says that the part begins at {begin}. Copy it again."
                )
            chunk = tensor.chunks[0]
            self._found.setdefault(key, []).append(
                (tensor, Chunk(chunk.file, chunk.offset, begin, chunk.shape, chunk.stride))
            )

    def joined(self) -> dict[str, StoredTensor]:
        """Return the whole tensors, by key.

        Raises:
            CheckpointError: Parts are missing, or do not belong together.
        """
        whole: dict[str, StoredTensor] = {}
        for key, parts in self._found.items():
            first = parts[0][0]
            for tensor, chunk in parts:
                if (tensor.dtype, len(tensor.shape)) != (first.dtype, len(first.shape)):
                    raise CheckpointError(
                        f"{key} is {tensor.dtype} and {tensor.shape} in {chunk.file.name}, but {first.dtype} and "
                        f"{first.shape} in {parts[0][1].file.name}: they are not parts of one tensor."
                    )
            shape = tuple(
                max(chunk.begin[dim] + chunk.shape[dim] for _, chunk in parts) for dim in range(len(first.shape))
            )
            whole[key] = StoredTensor(key, first.dtype, shape, tuple(chunk for _, chunk in parts))
            whole[key].check()
        return whole


def _places(shard: SafetensorsFile) -> dict[str, tuple[int, ...]]:
    """Return where the tensor parts in a file begin, if one of several torch ranks wrote the file."""
    if _PARTS_ENTRY not in shard.metadata:
        return {}
    try:
        parts = parse(shard.metadata[_PARTS_ENTRY].encode("utf-8"))
        places = {key: part["saved_offsets"] for key, part in parts.items()}
        if not all(map(are_sizes, places.values())):
            raise ValueError("offsets are not numbers")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{shard.file.name} is damaged: `{_PARTS_ENTRY}` in its metadata cannot be read "
            f"({type(error).__name__}: {error}). Copy it again."
        ) from error
    return {key: tuple(place) for key, place in places.items()}


def _shards(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(SUFFIX) and name != VALUES_FILE)


def _common(notes: list[dict[str, str]]) -> dict[str, str]:
    """Return the metadata entries that are equal in all files."""
    first = notes[0] if notes else {}
    return {
        key: value
        for key, value in first.items()
        if key != _PARTS_ENTRY and all(other.get(key) == value for other in notes)
    }


def _begins_like_one(start: bytes) -> bool:
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES
