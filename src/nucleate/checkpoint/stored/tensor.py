"""A tensor as it lies in files: boxes of it, each row by row, and how any range of its elements is read.

A reader describes every format in these terms, so what is done with a tensor (load it whole, a shard of it, cast,
quantize, convert) never depends on the format it came from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nucleate.checkpoint.stored.data_file import Bytes, DataFile
from nucleate.deferred import Given
from nucleate.errors import CheckpointError, name_list

# What is not row by row is read through a buffer of at most so many bytes, whatever the tensor's size.
_BUFFER_BYTES = 4 << 20
# So many bytes are read in the time that it takes to ask for them: it is quicker to read what is not wanted, too.
_QUICK_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor that lies in one file.

    Attributes:
        file: Where.
        offset: The place of its first element in the file, in bytes.
        begin: Its first index in the tensor, for each dimension.
        shape: How long it is in each dimension.
        stride: In elements, where it does not lie row by row.
    """

    file: Bytes
    offset: int
    begin: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None

    def extent_bytes(self, dtype: torch.dtype) -> int:
        """Return how many bytes of the file it reaches over."""
        if 0 in self.shape:
            return 0
        if self.stride is None:
            return math.prod(self.shape) * dtype.itemsize
        last = sum((length - 1) * stride for length, stride in zip(self.shape, self.stride, strict=True))
        return (last + 1) * dtype.itemsize


@dataclass(frozen=True, eq=False)
class StoredTensor(Given):
    """A tensor in a checkpoint.

    Attributes:
        key: Its name there.
        dtype: Of its elements.
        shape: Of the whole.
        chunks: Boxes that cover it, none twice.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @classmethod
    def whole(cls, key: str, dtype: torch.dtype, shape: Sequence[int], file: Bytes, offset: int) -> StoredTensor:
        """Return a tensor that lies in one piece, row by row."""
        chunk = Chunk(file, offset, (0,) * len(shape), tuple(shape))
        return cls(key, dtype, tuple(shape), (chunk,))

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """How large it is."""
        return self.numel * self.dtype.itemsize

    @property
    def is_plain(self) -> bool:
        """Whether it lies in one piece, row by row."""
        return len(self.chunks) == 1 and self.chunks[0].stride is None and self.chunks[0].shape == self.shape

    @property
    def identity(self) -> tuple[Any, ...]:
        """A key that is equal for two names of the same elements."""
        return (self.dtype, self.shape, self.chunks)

    @property
    def files(self) -> tuple[Bytes, ...]:
        """The files that it lies in."""
        return tuple(chunk.file for chunk in self.chunks)

    @property
    def origin(self) -> str:
        """The keys that it is made from, if these are other ones; else empty."""
        return ""

    def check(self) -> None:
        """Make sure that the boxes cover the tensor, none overlap, and all lie within their files.

        Raises:
            CheckpointError: Not so; the message names tensor and file.
        """
        covered = 0
        for chunk in self.chunks:
            inside = len(chunk.begin) == len(chunk.shape) == len(self.shape) and all(
                begin >= 0 and length >= 0 and begin + length <= whole
                for begin, length, whole in zip(chunk.begin, chunk.shape, self.shape, strict=True)
            )
            if not inside:
                raise CheckpointError(
                    f"{self.key} in {chunk.file.name} is damaged: it has the shape {self.shape}, but a part of it is "
                    f"said to begin at {chunk.begin} and to have the shape {chunk.shape}."
                )
            end = chunk.offset + chunk.extent_bytes(self.dtype)
            if chunk.offset < 0 or end > chunk.file.size_bytes:
                raise CheckpointError(
                    f"{self.key} lies at bytes {chunk.offset} to {end} of {chunk.file.name}, which has "
                    f"{chunk.file.size_bytes} bytes: the file is damaged or was cut short. Copy it again."
                )
            covered += math.prod(chunk.shape)
        if (twice := _overlapping(self.chunks)) is not None:
            one, other = twice
            raise CheckpointError(
                f"{self.key} is damaged: {one.file.name} and {other.file.name} both hold the part of it that begins at "
                f"{tuple(map(max, one.begin, other.begin))}."
            )
        if covered != self.numel:
            raise CheckpointError(
                f"{self.key} is damaged: it has the shape {self.shape}, {self.numel} elements, but the parts that are "
                f"there hold {covered}: {name_list(sorted({chunk.file.name for chunk in self.chunks})) or 'none'}. A "
                "file of another rank may be missing."
            )

    def is_same(self, other: StoredTensor) -> bool:
        """Return whether two names stand for the same bytes, as those of tied tensors may."""
        return self.identity == other.identity

    def order(self, start: int) -> tuple[int, int]:
        """Return a key by which ranges are read in the order in which they lie on disk.

        Args:
            start: The range's first element.
        """
        if not self.chunks:
            return (0, 0)
        first = self.chunks[0]
        return (first.file.number, first.offset + start * self.dtype.itemsize)

    def expect(self, numel: int) -> None:
        for chunk in self.chunks:
            if isinstance(chunk.file, DataFile):
                chunk.file.expect(numel * self.dtype.itemsize * math.prod(chunk.shape) // max(1, self.numel))

    def is_far(self) -> bool:
        return any(isinstance(chunk.file, DataFile) and chunk.file.is_far() for chunk in self.chunks)

    def check_unchanged(self) -> None:
        for file in {id(chunk.file): chunk.file for chunk in self.chunks}.values():
            if isinstance(file, DataFile):
                file.check_unwritten()

    def describe(self) -> str:
        """Return what is equal on all ranks that read the same file, wherever each finds it."""
        parts = [(Path(c.file.name).name, c.offset, c.begin, c.shape, c.stride) for c in self.chunks]
        return repr((self.key, self.dtype, self.shape, parts))

    def read(self, start: int, out: Tensor) -> None:
        """Read a range of the elements in the order of their indices.

        Args:
            start: The range's first element.
            out: One-dimensional, contiguous, on the CPU and of this dtype: as many elements as are wanted.

        Raises:
            CheckpointError: A file is shorter than it was, or the disk fails.
        """
        assert out.dtype == self.dtype
        assert out.is_contiguous()
        if not out.numel():
            return
        if self.is_plain:
            itemsize = self.dtype.itemsize
            chunk = self.chunks[0]
            chunk.file.read_into(out.data_ptr(), out.numel() * itemsize, chunk.offset + start * itemsize)
            return
        done = 0
        for begin, shape in _boxes(self.shape, start, start + out.numel()):
            numel = math.prod(shape)
            self.read_box(begin, out[done : done + numel].view(shape))
            done += numel

    def read_box(self, begin: Sequence[int], out: Tensor) -> None:
        """Read a box of the tensor.

        Args:
            begin: Its first index, for each dimension.
            out: On the CPU and of this dtype, with the shape of the box; of any strides.

        Raises:
            CheckpointError: A file is shorter than it was, or the disk fails.
        """
        assert out.dtype == self.dtype
        for chunk in self.chunks:
            low = tuple(map(max, begin, chunk.begin))
            high = tuple(
                min(b + n, c + m) for b, n, c, m in zip(begin, out.shape, chunk.begin, chunk.shape, strict=True)
            )
            if any(first >= end for first, end in zip(low, high, strict=True)):
                continue
            target = out
            offset = chunk.offset
            strides = _row_by_row(chunk.shape) if chunk.stride is None else chunk.stride
            for dim, (first, end) in enumerate(zip(low, high, strict=True)):
                target = target.narrow(dim, first - begin[dim], end - first)
                offset += (first - chunk.begin[dim]) * strides[dim] * self.dtype.itemsize
            _read_strided(chunk.file, offset, strides, target)


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield boxes, as first index and shape, that make up a range of the elements in their order.

    >>> list(_boxes((3, 4), 2, 9))
    [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # all in one row
        for begin, lengths in _boxes(shape[1:], start - last * row, stop - last * row):
            yield (last, *begin), (1, *lengths)
        return
    for begin, lengths in _boxes(shape[1:], start - (first - 1) * row, row) if start < first * row else ():
        yield (first - 1, *begin), (1, *lengths)
    if first < last:
        yield (first, *(0,) * len(shape[1:])), (last - first, *shape[1:])
    for begin, lengths in _boxes(shape[1:], 0, stop - last * row):
        yield (last, *begin), (1, *lengths)


def _row_by_row(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor that lies row by row."""
    strides = [1]
    for length in reversed(shape[1:]):
        strides.append(strides[-1] * length)
    return tuple(reversed(strides[: len(shape)]))


def _read_strided(file: Bytes, offset: int, strides: tuple[int, ...], target: Tensor) -> None:
    """Read elements that lie with `strides` from a byte on into a tensor of their shape."""
    itemsize = target.element_size()
    # Dims of one element, and those that repeat one (as `expand` makes them), are no dims to the file.
    for dim in reversed(range(target.dim())):
        if target.shape[dim] == 1:
            target = target.select(dim, 0)
            strides = (*strides[:dim], *strides[dim + 1 :])
    for dim, stride in enumerate(strides):
        if stride == 0:
            once = torch.empty([*target.shape[:dim], *target.shape[dim + 1 :]], dtype=target.dtype, device="cpu")
            _read_strided(file, offset, (*strides[:dim], *strides[dim + 1 :]), once)
            target.copy_(once.unsqueeze(dim).expand(target.shape))
            return
    if strides == _row_by_row(target.shape) and target.is_contiguous():
        file.read_into(target.data_ptr(), target.numel() * itemsize, offset)
        return
    extent = 1 + sum((length - 1) * stride for length, stride in zip(target.shape, strides, strict=True))
    wanted = target.numel() * itemsize
    if extent * itemsize <= max(_QUICK_BYTES, min(4 * wanted, _BUFFER_BYTES)) or target.numel() == 1:
        found = torch.empty(extent, dtype=target.dtype, device="cpu")
        file.read_into(found.data_ptr(), extent * itemsize, offset)
        target.copy_(found.as_strided(target.shape, strides))
        return
    # What lies farthest apart is read by itself.
    dim = max(range(len(strides)), key=lambda dim: strides[dim])
    half = target.shape[dim] // 2
    _read_strided(file, offset, strides, target.narrow(dim, 0, half))
    _read_strided(
        file, offset + half * strides[dim] * itemsize, strides, target.narrow(dim, half, target.shape[dim] - half)
    )


def _overlapping(chunks: tuple[Chunk, ...]) -> tuple[Chunk, Chunk] | None:
    """Return two chunks that overlap, if there are any."""
    filled = [chunk for chunk in chunks if 0 not in chunk.shape]
    if len(filled) < 2 or not filled[0].shape:
        return (filled[0], filled[1]) if len(filled) > 1 else None
    # In the dim that tells most of them apart, only neighbours need to be compared, however many ranks there were.
    dim = max(range(len(filled[0].shape)), key=lambda dim: len({chunk.begin[dim] for chunk in filled}))
    open_: list[Chunk] = []
    for chunk in sorted(filled, key=lambda chunk: chunk.begin[dim]):
        open_ = [other for other in open_ if other.begin[dim] + other.shape[dim] > chunk.begin[dim]]
        for other in open_:
            if _overlap(chunk, other):
                return other, chunk
        open_.append(chunk)
    return None


def _overlap(one: Chunk, other: Chunk) -> bool:
    return all(
        a < b + m and b < a + n for a, n, b, m in zip(one.begin, one.shape, other.begin, other.shape, strict=True)
    )
