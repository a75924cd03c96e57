"""The safetensors writer: a folder in Hugging Face's layout, or a single file. Every rank writes its own boxes.

This file decides which tensors share a file, and their order. https://github.com/huggingface/safetensors#format
describes the format: eight bytes with the header's length, the header in JSON, and the tensors without gaps.
"""

from __future__ import annotations

import base64
import ctypes
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, final

import torch

from nucleate.checkpoint.disk.folder import write_marker
from nucleate.checkpoint.saving.rank_share import Box, SavedTensor
from nucleate.checkpoint.saving.snapshot import Snapshot
from nucleate.checkpoint.state.values import VALUES
from nucleate.checkpoint.writers import allocation, slabs
from nucleate.checkpoint.writers.base import Writer
from nucleate.checkpoint.writers.slabs import Place
from nucleate.cluster.save_group import SaveGroup
from nucleate.errors import CheckpointError, name_list

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
VALUES_FILE = "nucleate.values.safetensors"
#: The field of a single file's metadata that holds the values.
VALUES_FIELD = "nucleate"
#: The name of one of several files with weights.
SHARD_PATTERN = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")

# The dtypes' names in safetensors (safetensors/torch.py, `_TYPES`, 0.8).
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
}
# The library refuses longer headers (safetensors/src/tensor.rs, `MAX_HEADER_SIZE`, 0.8).
_MAX_HEADER_BYTES = 100_000_000
# The tensors begin at a multiple of this: a program that maps the file finds them aligned for every dtype and vector
# unit.
_ALIGNMENT = 64


@final
class SafetensorsWriter(Writer):
    """A writer of folders that Hugging Face's libraries read, with files of a chosen size, or of one file.

    A folder holds the values in a separate tensor. A single file holds them in its metadata.
    """

    name = "safetensors"
    suffixes: ClassVar[tuple[str, ...]] = (".safetensors",)
    keeps_others: ClassVar[bool] = True

    def __init__(self) -> None:
        self._max_shard_bytes = 5 * 10**9

    def limit_files(self, max_bytes: int) -> None:
        # A single tensor may be larger than this limit.
        self._max_shard_bytes = max_bytes

    def check(self, snapshot: Snapshot) -> None:
        wrong = [f"{held.key} ({held.dtype})" for held in snapshot.tensors if held.dtype not in _DTYPES]
        if wrong:
            raise CheckpointError(
                f"safetensors has no name for the dtype of {name_list(wrong)}. Convert these tensors, or save as a "
                'folder with format="dcp" or as a torch file (.pt).'
            )
        if any(held.key == "__metadata__" for held in snapshot.tensors):
            raise CheckpointError(
                "a tensor has the key __metadata__, which safetensors reserves for itself. Rename the tensor."
            )

    def write(self, snapshot: Snapshot, draft: Path, group: SaveGroup) -> None:
        what = f"writing {draft}"
        places: dict[str, Place] = {}
        is_folder = draft.is_dir()
        with group.all_or_none(what):
            if group.rank == 0:
                places = self._create_folder(snapshot, draft) if is_folder else _create_file(snapshot, draft)
        slabs.write_tensors(snapshot.tensors, group.broadcast(places), draft, group, what, snapshot.moved)
        with group.all_or_none(what):
            if group.rank == 0 and is_folder:
                write_marker(draft, self.name, group.world_size)

    def _create_folder(self, snapshot: Snapshot, draft: Path) -> dict[str, Place]:
        shards = _shards(snapshot.tensors, self._max_shard_bytes)
        places: dict[str, Place] = {}
        for number, tensors in enumerate(shards, start=1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            places.update(_create(draft, name, tensors, {"format": "pt"}))
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": snapshot.size_bytes},
                "weight_map": {key: places[key].file for key in sorted(places)},
            }
            text = (json.dumps(index, indent=2) + "\n").encode()
            allocation.create_file(draft / INDEX, len(text), text)
        assert snapshot.values is not None, "on rank 0 it is there"
        values = snapshot.values
        held = SavedTensor(VALUES, values.dtype, tuple(values.shape), None, (Box((0,), values),))
        head, _ = _header([held], {})
        data = head + ctypes.string_at(values.data_ptr(), values.numel())
        allocation.create_file(draft / VALUES_FILE, len(data), data)
        return places


def _create_file(snapshot: Snapshot, draft: Path) -> dict[str, Place]:
    assert snapshot.values is not None, "on rank 0 it is there"
    values = ctypes.string_at(snapshot.values.data_ptr(), snapshot.values.numel())
    metadata = {"format": "pt", VALUES_FIELD: base64.b64encode(values).decode()}
    return _create(draft, "", snapshot.tensors, metadata)


def _shards(tensors: Sequence[SavedTensor], max_bytes: int) -> list[list[SavedTensor]]:
    """Return the tensors of each file: in order, as many as fit, at least one. Without tensors, return one file."""
    shards: list[list[SavedTensor]] = [[]]
    size_bytes = 0
    for held in tensors:
        if shards[-1] and size_bytes + held.size_bytes > max_bytes:
            shards.append([])
            size_bytes = 0
        shards[-1].append(held)
        size_bytes += held.size_bytes
    return shards


def _create(draft: Path, name: str, tensors: Sequence[SavedTensor], metadata: dict[str, str]) -> dict[str, Place]:
    """Create one file with everything but the tensors' bytes, and return the tensors' places in the file."""
    # Wide dtypes come first. Then every tensor is aligned, although the format allows no padding between tensors.
    ordered = sorted(tensors, key=lambda held: -held.dtype.itemsize)
    head, offsets = _header(ordered, metadata)
    path = draft / name if name else draft
    if len(head) > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"the header of {path} would have {len(head)} bytes, but safetensors reads at most {_MAX_HEADER_BYTES}: "
            "there are too many tensors, or values that are too large for one file. Save to a folder instead."
        )
    allocation.create_file(path, len(head) + sum(held.size_bytes for held in ordered), head)
    return {
        held.key: Place(name, len(head) + offset, held.dtype, held.shape)
        for held, offset in zip(ordered, offsets, strict=True)
    }


def _header(tensors: Sequence[SavedTensor], metadata: dict[str, str]) -> tuple[bytes, list[int]]:
    """Return the bytes before the tensors, and the offset of each tensor from the end of these bytes."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offsets: list[int] = []
    end = 0
    for held in tensors:
        offsets.append(end)
        end += math.prod(held.shape) * held.dtype.itemsize
        entries[held.key] = {
            "dtype": _DTYPES[held.dtype],
            "shape": list(held.shape),
            "data_offsets": [offsets[-1], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, offsets
