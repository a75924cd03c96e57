"""Chunks: the boxes of a tensor, each in one file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from nucleate.checkpoint.stored.data_file import Bytes
from nucleate.errors import CheckpointError

# Strategies cut a tensor in fewer dims than this. A file that somebody made to harm may need more cuts.
_MOST_CUTS = 8


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor that lies in one file.

    Attributes:
        file: The file.
        offset: The place of its first element in the file, in bytes.
        begin: Its first index in the tensor, for each dim.
        shape: Its size in each dim.
        stride: Its strides in elements, if it does not lie row by row.
    """

    file: Bytes
    offset: int
    begin: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None

    def extent_bytes(self, dtype: torch.dtype) -> int:
        """Return the number of bytes from its first to its last element in the file."""
        if 0 in self.shape:
            return 0
        if self.stride is None:
            return math.prod(self.shape) * dtype.itemsize
        last = sum((length - 1) * stride for length, stride in zip(self.shape, self.stride, strict=True))
        return (last + 1) * dtype.itemsize

    @property
    def mark(self) -> int:
        """A number that sorts the chunks of a file, and is known without reading it."""
        return self.offset

    def is_inside(self, shape: tuple[int, ...]) -> bool:
        """Return whether it lies inside a tensor of a shape."""
        if not len(self.begin) == len(self.shape) == len(shape):
            return False
        # A loop, because a generator takes three times as long, and a checkpoint may have millions of chunks.
        for begin, length, whole in zip(self.begin, self.shape, shape, strict=True):
            if begin < 0 or length < 0 or begin + length > whole:
                return False
        return True

    def check_place(self, key: str, dtype: torch.dtype) -> None:
        """Make sure that it lies within its file. This method does not read the file.

        Raises:
            CheckpointError: The file is too short; the message begins with the tensor's key.
        """
        end = self.offset + self.extent_bytes(dtype)
        if self.offset < 0 or end > self.file.size_bytes:
            raise CheckpointError(
                f"{key} lies at bytes {self.offset} to {end} of {self.file.name}, which has "
                f"{self.file.size_bytes} bytes: the file is damaged or was cut short. Copy it again."
            )

    def locate(self) -> None:
        """Find its elements in the file, if nobody has done it yet.

        Raises:
            CheckpointError: The file holds something else there, or the disk fails.
        """

    def describe(self) -> tuple[Any, ...]:
        """Return values that are equal on all ranks that read the same file, and are known without reading it."""
        return (Path(self.file.name).name, self.offset, self.begin, self.shape, self.stride)


def overlapping(chunks: Sequence[Chunk]) -> tuple[Chunk, Chunk] | None:
    """Return two chunks that overlap, or None."""
    filled = [chunk for chunk in chunks if 0 not in chunk.shape]
    if len(filled) < 2 or not filled[0].shape:
        return (filled[0], filled[1]) if len(filled) > 1 else None
    return next((found for group in _met(filled, _MOST_CUTS) if (found := _pair(group)) is not None), None)


def meet(begin: Sequence[int], shape: Sequence[int], other: Sequence[int], lengths: Sequence[int]) -> bool:
    """Return whether two boxes overlap, each given by its first index and its shape."""
    return all(a < b + m and b < a + n for a, n, b, m in zip(begin, shape, other, lengths, strict=True))


def _met(chunks: list[Chunk], most_cuts: int) -> Iterator[list[Chunk]]:
    """Cut chunks into groups that do not overlap one another, and yield the groups that cannot be cut in any dim.

    A mesh of ranks cuts a tensor into a grid. Its rows are found in one dim, and the chunks of each row in another. So
    the time hardly grows faster than the number of chunks.
    """
    for dim in range(len(chunks[0].shape)):
        groups = _cut(chunks, dim)
        if len(groups) > 1 and most_cuts:
            for group in groups:
                if len(group) > 1:
                    yield from _met(group, most_cuts - 1)
            return
    yield chunks


def _cut(chunks: list[Chunk], dim: int) -> list[list[Chunk]]:
    """Return groups of chunks, in ascending order, that share no index in a dim."""
    ends = [(chunk.begin[dim], chunk.begin[dim] + chunk.shape[dim], chunk) for chunk in chunks]
    ends.sort(key=itemgetter(0))
    groups: list[list[Chunk]] = []
    last = -1
    for begin, end, chunk in ends:
        if begin >= last:
            groups.append([chunk])
            last = end
        else:
            groups[-1].append(chunk)
            last = max(last, end)
    return groups


def _pair(chunks: list[Chunk]) -> tuple[Chunk, Chunk] | None:
    """Return two chunks that overlap, or None. In the dim with the most different first indices, neighbours compare."""
    dim = max(range(len(chunks[0].shape)), key=lambda dim: len({chunk.begin[dim] for chunk in chunks}))
    open_: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.begin[dim]):
        open_ = [other for other in open_ if other.begin[dim] + other.shape[dim] > chunk.begin[dim]]
        for other in open_:
            if meet(chunk.begin, chunk.shape, other.begin, other.shape):
                return other, chunk
        open_.append(chunk)
    return None
