"""The header of one safetensors file, parsed and checked against the length of the file.

This module does not use the safetensors package, because the package maps the file: a file that is cut short while it
is mapped kills the process. The format, as of safetensors 0.8: 8 bytes with the header's length, little-endian; the
header as JSON; the tensors, without gaps.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from nucleate.checkpoint.readers.strict_json import are_sizes, cut, parse
from nucleate.checkpoint.stored.data_file import DataFile
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.errors import CheckpointError

#: The longest header that the safetensors package reads (safetensors/src/tensor.rs, 0.8).
MAX_HEADER_BYTES = 100_000_000
#: The most dims that torch computes with (c10/core/TensorImpl.h and ATen/TensorIterator.h, 2.13).
MAX_DIMS = 64

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    # One byte holds two numbers. The header counts numbers, torch counts bytes.
    "F4": torch.float4_e2m1fn_x2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class SafetensorsFile:
    """The checked header of one file.

    Attributes:
        file: The file itself.
        tensors: The tensors by key, in the order in which they lie in the file.
        metadata: The strings that the file's writer added.
    """

    file: DataFile
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]

    @classmethod
    def read(cls, file: DataFile, start: int = 0) -> SafetensorsFile:
        """Read and check the header of `file`.

        Args:
            file: The file.
            start: The place in the file where the header begins.

        Raises:
            CheckpointError: The file is damaged, or is not a safetensors file.
        """
        header, data_offset = _header(file, start)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise _damaged(file, "`__metadata__` in its header must map strings to strings")
        available = file.size_bytes - data_offset
        entries = sorted(
            (_Entry.read(file, key, entry, available) for key, entry in header.items()),
            key=lambda entry: (entry.begin, entry.end),
        )
        end, before = 0, "the header"
        for entry in entries:
            if entry.begin != end:
                relation = "overlaps with" if entry.begin < end else f"leaves a gap of {entry.begin - end} bytes after"
                raise _damaged(file, f"{entry.key}, at bytes {entry.begin} to {entry.end}, {relation} {before}")
            end, before = entry.end, entry.key
        if end != available:
            raise _damaged(file, f"{available - end} bytes after {before} belong to no tensor")
        tensors = {
            entry.key: StoredTensor.whole(entry.key, entry.dtype, entry.shape, file, data_offset + entry.begin)
            for entry in entries
        }
        return cls(file, tensors, metadata)


@dataclass(frozen=True, slots=True)
class _Entry:
    """The checked header entry of one tensor."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @classmethod
    def read(cls, file: DataFile, key: str, entry: Any, available: int) -> _Entry:
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise _damaged(file, f"{key} has no dtype, shape and data_offsets in its header")
        name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(name, str) or name not in DTYPES:
            raise CheckpointError(
                f"{key} in {file.name} has the dtype {cut(name)}, which torch {torch.__version__} does not have. "
                f"The known dtypes are {', '.join(DTYPES)}. If the file is not damaged, another version of torch or "
                "nucleate may read it."
            )
        if not are_sizes(shape) or len(shape) > MAX_DIMS:
            raise _damaged(file, f"{key} has the shape {cut(shape)}")
        if not are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise _damaged(file, f"{key} has the data_offsets {cut(offsets)}")
        begin, end = offsets
        if end > available:
            raise CheckpointError(
                f"{key} lies at bytes {begin} to {end} of the data of {file.name}, which has {available}: the file is "
                "damaged or was cut short. Copy it again."
            )
        dtype = DTYPES[name]
        if name == "F4":
            if not shape or shape[-1] % 2:
                raise _damaged(file, f"{key} is F4 and has the shape {cut(shape)}, whose last dim must be even")
            shape = [*shape[:-1], shape[-1] // 2]
        expected = dtype.itemsize
        for length in shape:
            # Stop multiplying early, because the product of many long numbers takes for ever.
            expected = expected * length if expected <= sys.maxsize else expected
        if 0 in shape:
            expected = 0
        if expected != end - begin:
            raise _damaged(
                file, f"{key} has the shape {cut(entry['shape'])} and the dtype {name} in {end - begin} bytes"
            )
        return cls(key, dtype, tuple(shape), begin, end)


def _header(file: DataFile, start: int) -> tuple[dict[str, Any], int]:
    """Return the parsed header, and the place where the data begins."""
    length = file.size_bytes - start
    if length < 8:
        raise CheckpointError(
            f"{file.name} has {length} bytes, too few for a safetensors file: it is empty or was cut short. "
            "Copy it again."
        )
    size_bytes = int.from_bytes(file.read(start, 8), "little")
    if size_bytes > MAX_HEADER_BYTES or size_bytes > length - 8:
        raise CheckpointError(
            f"{file.name} has {length} bytes and announces a header of {size_bytes} bytes; the limit is "
            f"{MAX_HEADER_BYTES}. It was cut short, or it is not a safetensors file. Copy it again."
        )
    try:
        header = parse(file.read(start + 8, size_bytes))
    except ValueError as error:
        raise _damaged(file, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(file, f"its header is {cut(header)} instead of an object")
    return header, start + 8 + size_bytes


def _damaged(file: DataFile, what: str) -> CheckpointError:
    return CheckpointError(f"{file.name} is damaged or not a safetensors file: {what}. Copy it again.")
