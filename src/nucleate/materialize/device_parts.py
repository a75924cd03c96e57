"""Parts that go to a device: in the dtype that sends the fewest bytes, into memory of any strides, or from that device.

`making.py` decides when they are sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from nucleate.deferred import RangeMaker, StreamCursors
from nucleate.devices import casts_there
from nucleate.materialize.parts import Part, Placed, parts_of

#: Rows of more elements are cut further, if they go into non-contiguous memory of a device.
MAX_ROW_NUMEL = 1 << 20


@dataclass(frozen=True, slots=True)
class Scattered(Placed):
    """A box of a contiguous tensor that goes into non-contiguous memory of a device.

    `start` is the first element of the tensor in the storage.

    Attributes:
        shape: The tensor's shape.
        offsets: The box's first index in each dim.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def row_numel(self) -> int:
        return math.prod(self.out.shape[1:])

    def cut(self, first: int, last: int) -> Part:
        offsets = (self.offsets[0] + first, *self.offsets[1:])
        return Scattered(self.maker, self.start, self.out[first:last], self.shape, offsets)

    def make(self, cursors: StreamCursors) -> None:
        for part in parts_of(self.maker, self.start, self.shape, self.offsets, self.out):
            part.make(cursors)


@dataclass(frozen=True, slots=True)
class Resident(Placed):
    """A part whose elements a tensor on this kind of device already has.

    Attributes:
        source: The tensor, of the shape of `out`.
    """

    source: Tensor

    @property
    def row_numel(self) -> int:
        return self.out.numel() // self.out.shape[0]

    def cut(self, first: int, last: int) -> Part:
        return Resident(self.maker, self.start, self.out[first:last], self.source[first:last])

    def make(self, cursors: StreamCursors) -> None:
        self.make_there()

    def make_there(self) -> bool:
        self.out.copy_(self.source)
        return True


def parts_on(maker: RangeMaker, base: int, shape: Sequence[int], offsets: Sequence[int], out: Tensor) -> Iterator[Part]:
    """Cut a box out of a contiguous tensor on a storage, for any device.

    Args:
        maker: The maker of the storage's ranges.
        base: The first element of the tensor in the storage.
        shape: The tensor's shape.
        offsets: The box's first index in each dim.
        out: The memory that receives the box, in the box's shape. On the CPU it is contiguous and has the range maker's
            dtype. On another device it may have any strides, and the values are cast to its dtype.
    """
    if out.device.type == "cpu":
        yield from parts_of(maker, base, shape, offsets, out)
        return
    if not out.numel():
        return
    resident = _resident(maker, base, tuple(shape), offsets, out)
    if resident is not None:
        yield resident
        return
    bare = maker.uncast()
    if casts_there(out.device, bare.dtype, out.dtype):
        maker = bare
    if out.is_contiguous() and not (out.is_conj() or out.is_neg()):
        yield from parts_of(maker, base, shape, offsets, out)
    else:
        yield from _scattered(maker, base, tuple(shape), tuple(offsets), out)


def _resident(
    maker: RangeMaker, base: int, shape: tuple[int, ...], offsets: Sequence[int], out: Tensor
) -> Resident | None:
    """Return the box as a part whose elements its device already has, or None if the device does not have them."""
    given = maker.given()
    source = None if given is None or base else given.resident(out.device)
    if source is None or math.prod(shape) != source.numel():
        return None
    if shape != tuple(source.shape):
        if shape != (out.numel(),) or not out.is_contiguous():
            return None
        # `out` is the flat memory of the whole storage.
        out = out.view(source.shape)
    else:
        for dim, (offset, length) in enumerate(zip(offsets, out.shape, strict=True)):
            source = source.narrow(dim, offset, length)
    return Resident(maker, base, *((out, source) if out.dim() else (out.view(1), source.view(1))))


def _scattered(
    maker: RangeMaker, base: int, shape: tuple[int, ...], offsets: tuple[int, ...], out: Tensor
) -> Iterator[Part]:
    if not out.dim():
        # Only a conjugate view: it has one element, and one more dim changes nothing.
        yield Scattered(maker, base, out.view(1), (1,), (0,))
    elif math.prod(out.shape[1:]) <= MAX_ROW_NUMEL:
        yield Scattered(maker, base, out, shape, offsets)
    else:
        inner = math.prod(shape[1:])
        for row in range(out.shape[0]):
            yield from _scattered(maker, base + (offsets[0] + row) * inner, shape[1:], offsets[1:], out[row])
