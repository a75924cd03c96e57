"""A reader and a writer of a format of one's own: `.rawtensors`, a line of JSON for each tensor, then their numbers.

```
rawtensors 1
{"key": "weight", "dtype": "float32", "shape": [2, 3]}
{"key": "bias", "dtype": "float32", "shape": [3]}

<the numbers of weight><the numbers of bias>
```

A reader says where each tensor lies and reads none. Sharding, casting, key maps, reports and conversion then work as
for every other format. A writer says where each tensor goes, and every rank writes its own parts there. What a state
holds beside tensors is one more tensor, of bytes, whose key is `nucleate.values`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from nucleate.checkpoint.readers import VALUES, Reader, contents_of
from nucleate.checkpoint.saving import Snapshot
from nucleate.checkpoint.stored import Contents, DataFile, StoredTensor, first_bytes
from nucleate.checkpoint.writers import Place, Writer, create_file, write_tensors
from nucleate.cluster.save_group import SaveGroup
from nucleate.errors import CheckpointError, name_list

MAGIC = b"rawtensors 1\n"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64, "uint8": torch.uint8}


@final
class RawReader(Reader):
    """Reads `.rawtensors` files."""

    name = "rawtensors"

    def claims(self, path: Path) -> bool:
        """Claim what is named so or begins so; `read` says what is wrong with it."""
        return path.is_file() and (path.suffix == ".rawtensors" or first_bytes(path, len(MAGIC)) == MAGIC)

    def read(self, path: Path) -> Contents:
        """Read the header, and check it against the length of the file."""
        # A DataFile stays open: nobody can exchange the file between its header and its numbers.
        file = DataFile(path)
        lines = _header(file)
        tensors: dict[str, StoredTensor] = {}
        offset = sum(len(line) + 1 for line in lines)
        for line in lines[1:-1]:
            key, dtype, shape = _entry(path, line)
            if key in tensors:
                raise CheckpointError(f"{path} is damaged: it holds two tensors called {key!r}. Copy it again.")
            tensors[key] = StoredTensor.whole(key, dtype, shape, file, offset)
            tensors[key].check()  # that it lies within the file
            offset += tensors[key].size_bytes
        if offset != file.size_bytes:
            raise CheckpointError(
                f"{path} is damaged: its tensors end at byte {offset}, but it has {file.size_bytes}. Copy it again."
            )
        if VALUES not in tensors:
            return Contents.flat(path, self.name, tensors)
        values = tensors.pop(VALUES)
        offset = values.chunks[0].offset
        return contents_of(path, self.name, tensors, file.read(offset, values.size_bytes))


@final
class RawWriter(Writer):
    """Writes `.rawtensors` files."""

    name = "rawtensors"
    suffixes: ClassVar[tuple[str, ...]] = (".rawtensors",)
    writes_folders: ClassVar[bool] = False

    def check(self, snapshot: Snapshot) -> None:
        """Refuse dtypes that the format has no name for."""
        wrong = [f"{held.key} ({held.dtype})" for held in snapshot.tensors if held.dtype not in DTYPES.values()]
        if wrong:
            raise CheckpointError(f".rawtensors has no name for the dtype of {name_list(wrong)}. Convert them.")

    def write(self, snapshot: Snapshot, draft: Path, group: SaveGroup) -> None:
        """Rank 0 makes the file and says where tensors go; then each rank writes what it holds."""
        what = f"writing {draft}"
        places: dict[str, Place] = {}
        with group.all_or_none(what):
            if group.rank == 0:
                places = _create(snapshot, draft)
        write_tensors(snapshot.tensors, group.broadcast(places), draft, group, what, snapshot.moved)


def _create(snapshot: Snapshot, draft: Path) -> dict[str, Place]:
    """Make a file of its full size with everything but the tensors, and return where those go."""
    assert snapshot.values is not None, "on rank 0 it is there"
    values = bytes(snapshot.values.tolist())
    head = MAGIC + _line(VALUES, torch.uint8, (len(values),))
    head += b"".join(_line(held.key, held.dtype, held.shape) for held in snapshot.tensors) + b"\n" + values
    places: dict[str, Place] = {}
    offset = len(head)
    for held in snapshot.tensors:
        places[held.key] = Place("", offset, held.dtype, held.shape)
        offset += held.size_bytes
    create_file(draft, offset, head)
    return places


def _line(key: str, dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    name = str(dtype).removeprefix("torch.")
    return json.dumps({"key": key, "dtype": name, "shape": list(shape)}).encode() + b"\n"


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a `.rawtensors` file.

    Args:
        path: Where it goes.
        tensors: By key, on the CPU.
    """
    with open(path, "wb") as file:
        file.write(MAGIC)
        for key, tensor in tensors.items():
            file.write(_line(key, tensor.dtype, tensor.shape))
        file.write(b"\n")
        for tensor in tensors.values():
            # Without NumPy, which nucleate does not need, this is how numbers become bytes.
            file.write(bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()))


def _header(file: DataFile) -> list[bytes]:
    """Return the lines of the header, the empty one at its end too, without reading the numbers that follow."""
    length = 4096
    while True:
        start = file.read(0, min(length, file.size_bytes))
        header, end, _ = start.partition(b"\n\n")
        if not start.startswith(MAGIC) or (not end and length >= file.size_bytes):
            raise CheckpointError(
                f"{file.name} is damaged or no .rawtensors file: its header has no end. Copy it again."
            )
        if end:
            return [*header.split(b"\n"), b""]
        length *= 4


def _entry(path: Path, line: bytes) -> tuple[str, torch.dtype, tuple[int, ...]]:
    """Return the key, dtype and shape that a line of the header tells; anything may stand in a damaged one."""
    try:
        entry: Any = json.loads(line)
        key, name, shape = entry["key"], entry["dtype"], entry["shape"]
        key.encode("utf-8")  # it is text, and can be printed
        if not all(type(length) is int and 0 <= length < 1 << 40 for length in shape) or len(shape) > 16:
            raise ValueError(f"the shape {str(shape)[:100]}")
        if math.prod(length for length in shape if length) > 1 << 60:
            raise ValueError("more elements than any file has")
        return key, DTYPES[name], tuple(shape)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged: the header line {line[:100]!r} tells of no tensor ({type(error).__name__}: {error}). "
            "Copy it again."
        ) from error
