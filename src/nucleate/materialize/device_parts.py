"""Parts that go to a device: in the dtype that moves fewest bytes, into memory of any strides, or from that device.

Only whoever sends them (`making.py`) knows when they cross.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from nucleate.deferred import Cursors, Pieces
from nucleate.devices import casts_there
from nucleate.materialize.parts import Part, Placed, parts_of

#: Rows of so many elements that do not lie one behind the other on a device are cut further.
MAX_ROW_NUMEL = 1 << 20


@dataclass(frozen=True, slots=True)
class Scattered(Placed):
    """A box of a contiguous tensor, into memory of a device where its elements do not follow one another.

    `start` is where the tensor begins in the storage.

    Attributes:
        shape: The tensor's shape.
        offsets: The box's first index in each dimension.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def row_numel(self) -> int:
        return math.prod(self.out.shape[1:])

    def cut(self, first: int, last: int) -> Part:
        offsets = (self.offsets[0] + first, *self.offsets[1:])
        return Scattered(self.pieces, self.start, self.out[first:last], self.shape, offsets)

    def make(self, cursors: Cursors) -> None:
        for part in parts_of(self.pieces, self.start, self.shape, self.offsets, self.out):
            part.make(cursors)


@dataclass(frozen=True, slots=True)
class Resident(Placed):
    """Elements that a tensor on this kind of device has.

    Attributes:
        source: The tensor, of the shape of `out`.
    """

    source: Tensor

    @property
    def row_numel(self) -> int:
        return self.out.numel() // self.out.shape[0]

    def cut(self, first: int, last: int) -> Part:
        return Resident(self.pieces, self.start, self.out[first:last], self.source[first:last])

    def make(self, cursors: Cursors) -> None:
        self.make_there()

    def make_there(self) -> bool:
        self.out.copy_(self.source)
        return True


def parts_on(pieces: Pieces, base: int, shape: Sequence[int], offsets: Sequence[int], out: Tensor) -> Iterator[Part]:
    """Cut a box out of a contiguous tensor on a storage, for any device.

    Args:
        pieces: Makes the storage.
        base: Where the tensor begins in it.
        shape: The tensor's shape.
        offsets: The box's first index in each dimension.
        out: Of the box's shape. On the CPU it is contiguous and of the pieces' dtype; on another device it may have
            any strides, and the values are cast to its dtype.
    """
    if out.device.type == "cpu":
        yield from parts_of(pieces, base, shape, offsets, out)
        return
    if not out.numel():
        return
    resident = _resident(pieces, base, tuple(shape), offsets, out)
    if resident is not None:
        yield resident
        return
    bare = pieces.uncast()
    if casts_there(out.device, bare.dtype, out.dtype):
        pieces = bare
    if out.is_contiguous() and not (out.is_conj() or out.is_neg()):
        yield from parts_of(pieces, base, shape, offsets, out)
    else:
        yield from _scattered(pieces, base, tuple(shape), tuple(offsets), out)


def _resident(
    pieces: Pieces, base: int, shape: tuple[int, ...], offsets: Sequence[int], out: Tensor
) -> Resident | None:
    """Return the box where its device has the elements already, whoever gives them, or None."""
    given = pieces.given()
    source = None if given is None or base else given.resident(out.device)
    if source is None or math.prod(shape) != source.numel():
        return None
    if shape != tuple(source.shape):
        if shape != (out.numel(),) or not out.is_contiguous():
            return None
        # All of it, as the storage that is made whole.
        out = out.view(source.shape)
    else:
        for dim, (offset, length) in enumerate(zip(offsets, out.shape, strict=True)):
            source = source.narrow(dim, offset, length)
    return Resident(pieces, base, *((out, source) if out.dim() else (out.view(1), source.view(1))))


def _scattered(
    pieces: Pieces, base: int, shape: tuple[int, ...], offsets: tuple[int, ...], out: Tensor
) -> Iterator[Part]:
    if not out.dim():
        # Only a conjugate view: it has one element, and a dim more changes nothing.
        yield Scattered(pieces, base, out.view(1), (1,), (0,))
    elif math.prod(out.shape[1:]) <= MAX_ROW_NUMEL:
        yield Scattered(pieces, base, out, shape, offsets)
    else:
        inner = math.prod(shape[1:])
        for row in range(out.shape[0]):
            yield from _scattered(pieces, base + (offsets[0] + row) * inner, shape[1:], offsets[1:], out[row])
