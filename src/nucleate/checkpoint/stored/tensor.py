"""Stored tensors: the boxes in which a tensor lies in files, and the code that reads any range of its elements.

Every reader describes its format in these terms. So the work on a tensor (load it or a shard, cast, quantize, convert)
never depends on the format of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nucleate.checkpoint.stored.chunk import Chunk, meet, overlapping
from nucleate.checkpoint.stored.data_file import Bytes, DataFile
from nucleate.deferred import ElementSource
from nucleate.deferred.replay import boxes
from nucleate.errors import CheckpointError, name_list

# Elements that do not lie row by row are read through a buffer of at most this size, whatever the tensor's size.
_BUFFER_BYTES = 4 << 20
# Reading this number of bytes takes only as long as the request itself, so it is quicker to read unwanted bytes, too.
_QUICK_BYTES = 64 << 10


@dataclass(frozen=True, eq=False)
class StoredTensor(ElementSource):
    """A tensor in a checkpoint.

    Attributes:
        key: Its name in the checkpoint.
        dtype: The dtype of its elements.
        shape: The shape of the whole tensor.
        chunks: The boxes that cover it without overlap.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @classmethod
    def whole(cls, key: str, dtype: torch.dtype, shape: Sequence[int], file: Bytes, offset: int) -> StoredTensor:
        """Return a tensor that lies in one chunk, row by row."""
        chunk = Chunk(file, offset, (0,) * len(shape), tuple(shape))
        return cls(key, dtype, tuple(shape), (chunk,))

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return self.numel * self.dtype.itemsize

    @property
    def is_plain(self) -> bool:
        """Whether it lies in one chunk, row by row."""
        return len(self.chunks) == 1 and self.chunks[0].shape == self.shape and self.chunks[0].stride is None

    @property
    def identity(self) -> tuple[Any, ...]:
        """A value that is equal for two names of the same elements."""
        return (self.dtype, self.shape, self.chunks)

    @property
    def files(self) -> tuple[Bytes, ...]:
        """The files that it lies in."""
        return tuple(chunk.file for chunk in self.chunks)

    @property
    def origin(self) -> str:
        """The keys that it is computed from, or an empty string if it is stored under its own key."""
        return ""

    def check(self) -> None:
        """Make sure that the boxes cover the tensor, none overlap, and all lie within their files.

        Raises:
            CheckpointError: The boxes are wrong; the message names the tensor and a file.
        """
        covered = 0
        for chunk in self.chunks:
            if not chunk.is_inside(self.shape):
                raise CheckpointError(
                    f"{self.key} in {chunk.file.name} is damaged: it has the shape {self.shape}, but one of its parts "
                    f"is said to begin at {chunk.begin} and to have the shape {chunk.shape}."
                )
            chunk.check_place(self.key, self.dtype)
            covered += math.prod(chunk.shape)
        if (twice := overlapping(self.chunks)) is not None:
            one, other = twice
            raise CheckpointError(
                f"{self.key} is damaged: {one.file.name} and {other.file.name} both hold its part that begins at "
                f"{tuple(map(max, one.begin, other.begin))}."
            )
        if covered != self.numel:
            raise CheckpointError(
                f"{self.key} is damaged: it has the shape {self.shape}, {self.numel} elements, but the parts that "
                f"exist hold {covered}: {name_list(sorted({chunk.file.name for chunk in self.chunks})) or 'none'}. A "
                "file of another rank may be missing."
            )

    def is_same(self, other: StoredTensor) -> bool:
        """Return whether two stored tensors have the same bytes, as tied tensors may."""
        return self.identity == other.identity

    def order(self, start: int) -> tuple[int, int]:
        """Return a value that sorts ranges into their order on disk.

        Args:
            start: The range's first element.
        """
        if not self.chunks:
            return (0, 0)
        first = self.chunks[0]
        return (first.file.number, first.mark + start * self.dtype.itemsize)

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
        """Return a text that is equal on all ranks that read the same file, whatever its folder on each rank."""
        return repr((self.key, self.dtype, self.shape, [chunk.describe() for chunk in self.chunks]))

    def locate(self, begin: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> None:
        """Find the elements of a box in the files, so that damage shows before anything is read into its place.

        Args:
            begin: The first index of the box, for each dim. The default is the whole tensor.
            shape: The shape of the box.

        Raises:
            CheckpointError: A file holds something else there, or the disk fails.
        """
        for chunk in self.chunks:
            if begin is None or shape is None or meet(begin, shape, chunk.begin, chunk.shape):
                chunk.locate()

    def read(self, start: int, out: Tensor) -> None:
        """Read a range of the elements in the order of their indices.

        Args:
            start: The range's first element.
            out: A one-dimensional contiguous tensor on the CPU, of this dtype and with the number of wanted elements.

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
        for begin, shape in boxes(self.shape, start, start + out.numel()):
            numel = math.prod(shape)
            self.read_box(begin, out[done : done + numel].view(shape))
            done += numel

    def read_box(self, begin: Sequence[int], out: Tensor) -> None:
        """Read a box of the tensor.

        Args:
            begin: The first index of the box, for each dim.
            out: A tensor on the CPU, of this dtype, with the shape of the box and any strides.

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


def _row_by_row(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor that lies row by row."""
    strides = [1]
    for length in reversed(shape[1:]):
        strides.append(strides[-1] * length)
    return tuple(reversed(strides[: len(shape)]))


def _read_strided(file: Bytes, offset: int, strides: tuple[int, ...], target: Tensor) -> None:
    """Read elements that lie in `file` with `strides`, from the byte `offset` on, into a tensor of their shape."""
    itemsize = target.element_size()
    # Dims of one element, and dims that repeat an element (as `expand` makes them), do not exist in the file.
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
    # The elements that lie farthest apart are read separately.
    dim = max(range(len(strides)), key=lambda dim: strides[dim])
    half = target.shape[dim] // 2
    _read_strided(file, offset, strides, target.narrow(dim, 0, half))
    _read_strided(
        file, offset + half * strides[dim] * itemsize, strides, target.narrow(dim, half, target.shape[dim] - half)
    )
