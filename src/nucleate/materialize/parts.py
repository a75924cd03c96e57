"""Parts: what of a storage this rank makes, as ranges of its elements.

A shard is a box of a tensor. Where its rows are long, each is made straight into its place. Where they are short, as
in a shard of the last dimension, some whole rows at a time are made in a small buffer and their middle is kept, which
costs the draws of all. A part that goes to a device is made in host memory and sent (`making.py`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nucleate.deferred import Cursors, Pieces
from nucleate.devices import Staging
from nucleate.layout import merged

#: Shorter ranges are cut out of whole rows.
MIN_RANGE_NUMEL = 1 << 12
#: Elements of the buffer for that.
BUFFER_NUMEL = 1 << 18


@dataclass(frozen=True, slots=True)
class Part(ABC):
    """A part of a storage that is made.

    Attributes:
        pieces: Makes it.
        start: The first element of the storage that is made.
    """

    pieces: Pieces
    start: int

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it goes."""

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """How large what is made is."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Into how many rows it can be cut."""

    @property
    @abstractmethod
    def row_numel(self) -> int:
        """How many elements of the storage are passed over or made for each row."""

    @property
    @abstractmethod
    def numel(self) -> int:
        """How many elements of the pieces' dtype cross to a device."""

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """How many bytes of a staging buffer a row takes."""

    @property
    @abstractmethod
    def places(self) -> Iterable[Tensor]:
        """Where it goes, as contiguous tensors."""

    @abstractmethod
    def cut(self, first: int, last: int) -> Part:
        """Return the rows from `first` to `last`."""

    @abstractmethod
    def make(self, cursors: Cursors) -> None:
        """Make it, where it goes to host memory."""

    def make_there(self) -> bool:
        """Make it on its device, if nothing has to cross for that, and return whether that was so."""
        return False

    @abstractmethod
    def on_host(self, memory: Tensor) -> Part:
        """Return the part that makes its values in host memory, `(numel,)` of the pieces' dtype."""

    @abstractmethod
    def send(self, staging: Staging, memory: Tensor) -> None:
        """Send the values from host memory to where they go."""


@dataclass(frozen=True, slots=True)
class Placed(Part):
    """A part that goes into a tensor.

    Attributes:
        out: Where it goes.
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
        return self.out.numel() // self.out.shape[0] * self.pieces.dtype.itemsize

    @property
    def places(self) -> Iterable[Tensor]:
        return (self.out,)

    def make_there(self) -> bool:
        value = self.pieces.constant()
        if value is not None:
            self.out.fill_(value)
        return value is not None

    def on_host(self, memory: Tensor) -> Part:
        return replace(self, out=memory.view(self.out.shape))

    def send(self, staging: Staging, memory: Tensor) -> None:
        staging.send(memory, self.out)


@dataclass(frozen=True, slots=True)
class Range(Placed):
    """Elements that follow one another in the storage, into memory where they do as well."""

    @property
    def row_numel(self) -> int:
        return 1

    def cut(self, first: int, last: int) -> Part:
        return Range(self.pieces, self.start + first, self.out[first:last])

    def make(self, cursors: Cursors) -> None:
        self.pieces.make(self.start, self.out, cursors)


@dataclass(frozen=True, slots=True)
class Columns(Placed):
    """The same columns of a number of rows.

    Attributes:
        width: How long a whole row is.
        column: The first column wanted.
    """

    width: int
    column: int

    @property
    def row_numel(self) -> int:
        return self.width

    def cut(self, first: int, last: int) -> Part:
        return Columns(self.pieces, self.start + first * self.width, self.out[first:last], self.width, self.column)

    def make(self, cursors: Cursors) -> None:
        step = max(1, BUFFER_NUMEL // self.width)
        buffer = torch.empty(min(step, self.num_rows), self.width, dtype=self.pieces.dtype, device="cpu")
        for row in range(0, self.num_rows, step):
            rows = buffer[: self.num_rows - row]
            self.pieces.make(self.start + row * self.width, rows.view(-1), cursors)
            self.out[row : row + step].copy_(rows[:, self.column : self.column + self.out.shape[1]])


def parts_of(pieces: Pieces, base: int, shape: Sequence[int], offsets: Sequence[int], out: Tensor) -> Iterator[Part]:
    """Cut a box out of a contiguous tensor on a storage.

    Args:
        pieces: Makes the storage.
        base: Where the tensor begins in it.
        shape: The tensor's shape.
        offsets: The box's first index in each dimension.
        out: Contiguous, of the box's shape and, on the CPU, of the pieces' dtype.
    """
    if not out.numel():
        return
    whole, first, size = merged(shape, offsets, out.shape)
    box = pieces.box(shape, offsets, out.shape) if len(whole) > 1 and base == 0 else None
    if box is not None:
        yield Range(box, 0, out.view(-1))
        return
    if len(whole) == 1:
        yield Range(pieces, base + first[0], out.view(-1))
        return
    inner = math.prod(whole[1:])
    rows = out.view(size)
    if len(whole) == 2 and size[1] < MIN_RANGE_NUMEL and inner <= BUFFER_NUMEL:
        yield Columns(pieces, base + first[0] * inner, rows, inner, first[1])
        return
    for row in range(size[0]):
        yield from parts_of(pieces, base + (first[0] + row) * inner, whole[1:], first[1:], rows[row])
