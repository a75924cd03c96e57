"""Parts: the elements of a storage that this rank makes, as ranges.

A shard is a box of a tensor. Where its rows are long, each row is made directly in its place. Where they are short, as
in a shard of the last dim, some whole rows at a time are made in a small buffer and only their middle is kept. This
costs the draws of the whole rows. A part that goes to a device is made in host memory and sent (`making.py`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nucleate.deferred import RangeMaker, StreamCursors
from nucleate.devices import Staging
from nucleate.layout import merged

#: Shorter ranges are cut out of whole rows.
MIN_RANGE_NUMEL = 1 << 12
#: Elements of the buffer for whole rows.
BUFFER_NUMEL = 1 << 18


@dataclass(frozen=True, slots=True)
class Part(ABC):
    """A part of a storage to make.

    Attributes:
        maker: The maker of the storage's ranges.
        start: The first element of the storage to make.
    """

    maker: RangeMaker
    start: int

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device that receives the part."""

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """The size of the finished part in bytes."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """The number of rows into which the part can be cut."""

    @property
    @abstractmethod
    def row_numel(self) -> int:
        """The number of elements of the storage that are made or skipped for each row."""

    @property
    @abstractmethod
    def numel(self) -> int:
        """The number of elements in the range maker's dtype that are sent to a device."""

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """The number of bytes of a staging buffer that a row takes."""

    @property
    @abstractmethod
    def places(self) -> Iterable[Tensor]:
        """The memory that receives the part, as contiguous tensors."""

    @abstractmethod
    def cut(self, first: int, last: int) -> Part:
        """Return the rows from `first` to `last`."""

    @abstractmethod
    def make(self, cursors: StreamCursors) -> None:
        """Make the part, if it goes to host memory."""

    def make_there(self) -> bool:
        """Make the part on its device, if no values have to be sent for that. Return whether it was made."""
        return False

    @abstractmethod
    def on_host(self, memory: Tensor) -> Part:
        """Return the part that makes its values in host memory, `(numel,)` in the range maker's dtype."""

    @abstractmethod
    def send(self, staging: Staging, memory: Tensor) -> None:
        """Send the values from host memory to the memory that receives the part."""


@dataclass(frozen=True, slots=True)
class Placed(Part):
    """A part that goes into a tensor.

    Attributes:
        out: The tensor.
    """

    out: Tensor

    @property
    def device(self) -> torch.device:
        return self.out.device

    @property
    def size_bytes(self) -> int:
        return self.out.numel() * self.out.element_size()

    @property
    def num_rows(self) -> int:
        return self.out.shape[0]

    @property
    def numel(self) -> int:
        return self.out.numel()

    @property
    def row_bytes(self) -> int:
        return self.out.numel() // self.out.shape[0] * self.maker.dtype.itemsize

    @property
    def places(self) -> Iterable[Tensor]:
        return (self.out,)

    def make_there(self) -> bool:
        value = self.maker.constant()
        if value is not None:
            self.out.fill_(value)
        return value is not None

    def on_host(self, memory: Tensor) -> Part:
        return replace(self, out=memory.view(self.out.shape))

    def send(self, staging: Staging, memory: Tensor) -> None:
        staging.send(memory, self.out)


@dataclass(frozen=True, slots=True)
class Range(Placed):
    """A range of the storage that goes into contiguous memory."""

    @property
    def row_numel(self) -> int:
        return 1

    def cut(self, first: int, last: int) -> Part:
        return Range(self.maker, self.start + first, self.out[first:last])

    def make(self, cursors: StreamCursors) -> None:
        self.maker.make(self.start, self.out, cursors)


@dataclass(frozen=True, slots=True)
class Columns(Placed):
    """The same columns of a number of rows.

    Attributes:
        width: The number of elements of a whole row.
        column: The first wanted column.
    """

    width: int
    column: int

    @property
    def row_numel(self) -> int:
        return self.width

    def cut(self, first: int, last: int) -> Part:
        return Columns(self.maker, self.start + first * self.width, self.out[first:last], self.width, self.column)

    def make(self, cursors: StreamCursors) -> None:
        step = max(1, BUFFER_NUMEL // self.width)
        buffer = torch.empty(min(step, self.num_rows), self.width, dtype=self.maker.dtype, device="cpu")
        for row in range(0, self.num_rows, step):
            rows = buffer[: self.num_rows - row]
            self.maker.make(self.start + row * self.width, rows.view(-1), cursors)
            self.out[row : row + step].copy_(rows[:, self.column : self.column + self.out.shape[1]])


def parts_of(maker: RangeMaker, base: int, shape: Sequence[int], offsets: Sequence[int], out: Tensor) -> Iterator[Part]:
    """Cut a box out of a contiguous tensor on a storage.

    Args:
        maker: The maker of the storage's ranges.
        base: The first element of the tensor in the storage.
        shape: The tensor's shape.
        offsets: The box's first index in each dim.
        out: Contiguous memory that receives the box, in the box's shape and, on the CPU, in the range maker's dtype.
    """
    if not out.numel():
        return
    whole, first, size = merged(shape, offsets, out.shape)
    box = maker.box(shape, offsets, out.shape) if len(whole) > 1 and base == 0 else None
    if box is not None:
        yield Range(box, 0, out.view(-1))
        return
    if len(whole) == 1:
        yield Range(maker, base + first[0], out.view(-1))
        return
    inner = math.prod(whole[1:])
    rows = out.view(size)
    if len(whole) == 2 and size[1] < MIN_RANGE_NUMEL and inner <= BUFFER_NUMEL:
        yield Columns(maker, base + first[0] * inner, rows, inner, first[1])
        return
    for row in range(size[0]):
        yield from parts_of(maker, base + (first[0] + row) * inner, whole[1:], first[1:], rows[row])
