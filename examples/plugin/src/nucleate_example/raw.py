"""A reader of a format of one's own: `.rawtensors`, one line of JSON for each tensor, then their numbers.

```
rawtensors 1
{"key": "weight", "dtype": "float32", "shape": [2, 3]}
{"key": "bias", "dtype": "float32", "shape": [3]}

<the numbers of weight><the numbers of bias>
```

A reader says where each tensor lies and reads none. Sharding, casting, key maps, reports and conversion then work as
for every other format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from nucleate.checkpoint.contents import Contents
from nucleate.checkpoint.files import DataFile, first_bytes
from nucleate.checkpoint.readers import Reader
from nucleate.checkpoint.stored import StoredTensor
from nucleate.errors import CheckpointError

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
        return Contents.flat(path, self.name, tensors)


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a `.rawtensors` file.

    Args:
        path: Where it goes.
        tensors: By key, on the CPU.
    """
    with open(path, "wb") as file:
        file.write(MAGIC)
        for key, tensor in tensors.items():
            name = str(tensor.dtype).removeprefix("torch.")
            file.write(json.dumps({"key": key, "dtype": name, "shape": list(tensor.shape)}).encode() + b"\n")
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
