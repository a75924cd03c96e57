"""Pieces: a storage of which any range of elements can be made alone.

Most of a model's memory is a random fill, or a constant, and a few operations on each element by itself. Of such a
storage a rank makes its own shard and nothing else, several threads make one parameter, and a chain of operations
runs while a chunk of it is in the cache. `pieces_of` reads the tape backward for the steps that still matter to a
storage; where one of them is of another kind the answer is None, and the storage is replayed whole (`replay.py`).

Only operations on finite numbers whose result IEEE 754 defines to the last bit are taken: torch computes others
differently in the vectorized and in the remaining part of a loop, so that a range would depend on where it begins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred.cursors import Cursors
from nucleate.deferred.fills import Fill, fill_of, fills_as_described, is_contiguous
from nucleate.deferred.random_program import Position, RandomProgram
from nucleate.deferred.tape import Constant, Step, Tape, TensorRef

aten = torch.ops.aten

#: Elements that are made at a time: they stay in the second-level cache, and torch does not split the work over
#: threads of its own (`at::internal::GRAIN_SIZE`).
CHUNK_NUMEL = 1 << 15

# Deeper chains, and storages that are written bit by bit, are replayed whole.
_MAX_DEPTH = 32
_MAX_WRITES = 256
# Which writes concern a chunk is looked up for so many chunks at once.
_CHUNKS_PER_BLOCK = 32

_EXACT = {
    aten.mul, aten.div, aten.add, aten.sub, aten.neg, aten.abs, aten.clamp, aten.clamp_min, aten.clamp_max,
    aten.relu, aten.sign,
}  # fmt: skip
_EXACT_IN_PLACE = {
    aten.mul_, aten.div_, aten.add_, aten.sub_, aten.neg_, aten.abs_, aten.clamp_, aten.clamp_min_,
    aten.clamp_max_, aten.relu_, aten.sign_,
}  # fmt: skip
_SUMS = {aten.add, aten.add_, aten.sub, aten.sub_}
_ARITHMETIC = _SUMS | {aten.mul, aten.mul_}
_QUOTIENTS = {aten.div, aten.div_}
_COPIES = {aten._to_copy, aten.clone}
_CONSTANTS = {
    aten.zeros: 0, aten.ones: 1, aten.zeros_like: 0, aten.ones_like: 1, aten.new_zeros: 0, aten.new_ones: 1,
}  # fmt: skip
_FULL = {aten.full: 1, aten.full_like: 1, aten.new_full: 2}


@dataclass(slots=True)
class _Source:
    """A range of another storage, as wide as the write that reads it."""

    pieces: Pieces
    start: int

    def read(self, begin: int, numel: int, cursors: Cursors) -> Tensor:
        out = torch.empty(numel, dtype=self.pieces.dtype)
        self.pieces.make_chunk(self.start + begin, out, cursors)
        return out


@dataclass(slots=True)
class _Write:
    """What one step does to a range of a storage.

    Attributes:
        start: The first element it writes.
        stop: The one behind the last.
        blind: Whether it does not look at what was there.
    """

    start: int
    stop: int
    blind: bool

    def apply(self, begin: int, out: Tensor, cursors: Cursors) -> None:
        """Write to `out`, which begins `begin` elements behind `start`."""
        raise NotImplementedError


@dataclass(slots=True)
class _Random(_Write):
    fill: Fill
    position: Position

    def apply(self, begin: int, out: Tensor, cursors: Cursors) -> None:
        self.fill.make(begin, out, lambda offset, count: cursors.seek(self.position, offset, count))


@dataclass(slots=True)
class _Constant(_Write):
    value: Any

    def apply(self, begin: int, out: Tensor, cursors: Cursors) -> None:
        out.fill_(self.value)


@dataclass(slots=True)
class _Copy(_Write):
    source: _Source | Constant

    def apply(self, begin: int, out: Tensor, cursors: Cursors) -> None:
        if isinstance(self.source, Constant):
            out.copy_(self.source.tensor.detach().view(-1)[begin : begin + out.numel()])
        else:
            out.copy_(self.source.read(begin, out.numel(), cursors))


@dataclass(slots=True)
class _Elementwise(_Write):
    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]

    def apply(self, begin: int, out: Tensor, cursors: Cursors) -> None:
        args = [arg.read(begin, out.numel(), cursors) if isinstance(arg, _Source) else arg for arg in self.args]
        if self.blind:
            out.copy_(self.func(*args, **self.kwargs))
        else:
            self.func(out, *args, **self.kwargs)


@dataclass(slots=True)
class Pieces:
    """A storage of a tape of which ranges can be made.

    Attributes:
        program: The random program of the tape.
        numel: How many elements it has.
        dtype: Of which dtype.
        writes: What is done to it, in order.
    """

    program: RandomProgram
    numel: int
    dtype: torch.dtype
    writes: list[_Write]

    def make(self, start: int, out: Tensor, cursors: Cursors) -> None:
        """Make the elements from `start` on.

        Args:
            start: The first element.
            out: One-dimensional, contiguous and on the CPU: as many elements as are wanted.
            cursors: Where the caller stands in the random streams.
        """
        # What is only drawn needs no cache, and torch never splits it; so threads meet in Python less often.
        is_drawn = len(self.writes) == 1 and isinstance(self.writes[0], _Random)
        step = 4 * CHUNK_NUMEL if is_drawn else CHUNK_NUMEL
        block = step * _CHUNKS_PER_BLOCK
        for first in range(0, out.numel(), block):
            last = min(out.numel(), first + block)
            writes = [write for write in self.writes if write.start < start + last and start + first < write.stop]
            for begin in range(first, last, step):
                self.make_chunk(start + begin, out[begin : min(last, begin + step)], cursors, writes)

    def make_chunk(self, start: int, out: Tensor, cursors: Cursors, writes: list[_Write] | None = None) -> None:
        """Make a range in one go, by those of `writes` that concern it; see `make`."""
        stop = start + out.numel()
        for write in self.writes if writes is None else writes:
            begin, end = max(start, write.start), min(stop, write.stop)
            if begin < end:
                write.apply(begin - write.start, out[begin - start : end - start], cursors)

    def order(self, start: int) -> tuple[int, int]:
        """Return a key by which parts are made in the order of the random stream.

        Args:
            start: The part's first element.
        """
        position = next(self._positions(), None)
        return (-1, start) if position is None else (position.run.number, position.offset + start)

    def prepare(self) -> None:
        """Execute the steps that the states it begins at depend on, so that threads need not.

        Raises:
            DeferredEditError: A real tensor that it reads was edited.
        """
        for position in self._positions():
            self.program.nearest(position)
        for constant in self._constants():
            constant.check()

    def _constants(self) -> Iterator[Constant]:
        for write in self.writes:
            if isinstance(write, _Copy) and isinstance(write.source, Constant):
                yield write.source
            for source in _sources(write):
                yield from source.pieces._constants()

    def _positions(self) -> Iterator[Position]:
        for write in self.writes:
            if isinstance(write, _Random):
                yield write.position
            for source in _sources(write):
                yield from source.pieces._positions()


def pieces_of(tape: Tape, program: RandomProgram, storage: int) -> Pieces | None:
    """Return how ranges of a storage are made, or None if it can only be made whole.

    Args:
        tape: The tape.
        program: The random program of its steps.
        storage: The storage's number on the tape.
    """
    pieces = _Reader(tape, program).pieces(storage, len(tape.steps), 0)
    if pieces is None or not pieces.numel:
        return None
    pieces.prepare()
    return pieces


class _Reader:
    """Reads one storage and those it depends on."""

    def __init__(self, tape: Tape, program: RandomProgram) -> None:
        self._tape = tape
        self._program = program
        self._seen: set[tuple[int, int]] = set()

    def pieces(self, storage: int, end: int, depth: int) -> Pieces | None:
        """Return how a storage is made as it was before the step `end`."""
        places = [place for place in self._tape.writers(storage) if place < end]
        # What is used twice would be made twice.
        if not places or depth > _MAX_DEPTH or (storage, places[-1]) in self._seen:
            return None
        self._seen.add((storage, places[-1]))
        dtype: torch.dtype | None = None
        writes: list[_Write] = []
        size_bytes = self._tape.size_bytes(storage)
        for place in reversed(places):
            step = self._tape.steps[place]
            refs = [ref for ref in (*step.written, *step.outputs) if ref.storage == storage]
            if len(set(refs)) != 1:
                return None
            ref = refs[0]
            dtype = dtype or ref.dtype
            if ref.dtype != dtype or ref.conj or ref.neg or not ref.size or not is_contiguous(ref):
                return None
            start, stop = ref.offset, ref.offset + ref.numel
            # What a later write covers without looking is dead.
            dead = any(later.blind and later.start <= start and stop <= later.stop for later in writes)
            if not dead and not (storage in step.creates and step.uninitialized):
                write = self._write(step, ref, depth)
                if write is None:
                    return None
                writes.append(write)
                if len(writes) > _MAX_WRITES:
                    return None
            if storage in step.creates:
                break
            if writes and writes[-1].blind and writes[-1].start == 0 and writes[-1].stop * dtype.itemsize == size_bytes:
                break
        assert dtype is not None
        return Pieces(self._program, size_bytes // dtype.itemsize, dtype, writes[::-1])

    def _write(self, step: Step, ref: TensorRef, depth: int) -> _Write | None:
        start, stop = ref.offset, ref.offset + ref.numel
        fill = fill_of(step)
        if fill is not None:
            assert step.position is not None
            if step.position.run.device != "cpu" or not fills_as_described(fill.is_normal, fill.dtype):
                return None
            return _Random(start, stop, True, fill, step.position)
        packet = getattr(step.func, "overloadpacket", None)
        if packet is aten.zero_:
            return _Constant(start, stop, True, 0)
        if packet is aten.fill_ and _is_number(step.args[1]):
            return _Constant(start, stop, True, step.args[1])
        if packet in _CONSTANTS:
            return _Constant(start, stop, True, _CONSTANTS[packet])
        if packet in _FULL and _is_number(step.args[_FULL[packet]]):
            return _Constant(start, stop, True, step.args[_FULL[packet]])
        if packet is aten.copy_:
            return self._copy(start, step.args[1], step, ref, depth)
        if packet in _COPIES and isinstance(step.args[0], TensorRef):
            return self._copy(start, step.args[0], step, ref, depth)
        if packet in _EXACT or packet in _EXACT_IN_PLACE:
            in_place = packet in _EXACT_IN_PLACE
            if (in_place and step.args[0] != ref) or not _is_exact(step, ref):
                return None
            args = [self._argument(arg, step, ref, depth) for arg in islice(step.args, int(in_place), None)]
            kwargs = {name: self._argument(arg, step, ref, depth) for name, arg in step.kwargs.items()}
            if any(arg is _UNKNOWN for arg in (*args, *kwargs.values())):
                return None
            if any(isinstance(arg, _Source) for arg in kwargs.values()):
                return None
            # Zeros of both signs are equal, and which of them is the larger one depends on the instructions.
            if packet not in _ARITHMETIC and any(isinstance(arg, _Source) for arg in args[int(not in_place) :]):
                return None
            return _Elementwise(start, stop, not in_place, step.func, args, kwargs)
        return None

    def _copy(self, start: int, value: Any, step: Step, ref: TensorRef, depth: int) -> _Write | None:
        stop = start + ref.numel
        if isinstance(value, Constant):
            tensor = value.tensor
            plain = tensor.layout == torch.strided and tensor.shape == ref.size and tensor.device.type == "cpu"
            if not plain or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
                return None
            # What is done to a NaN keeps or loses its payload, depending on the instructions.
            if not _casts_exactly(tensor.dtype, ref.dtype) or not bool(tensor.detach().isfinite().all()):
                return None
            return _Copy(start, stop, True, value)
        source = self._argument(value, step, ref, depth)
        if not isinstance(source, _Source) or not _casts_exactly(source.pieces.dtype, ref.dtype):
            return None
        return _Copy(start, stop, True, source)

    def _argument(self, value: Any, step: Step, ref: TensorRef, depth: int) -> Any:
        """Return a number as it is and a tensor of the written one's shape as a source."""
        if value is None or _is_number(value):
            return value
        if not isinstance(value, TensorRef) or value.size != ref.size or value.conj or value.neg:
            return _UNKNOWN
        # On the storage that is written it would be the old value.
        if not is_contiguous(value) or value.storage == ref.storage:
            return _UNKNOWN
        pieces = self.pieces(value.storage, step.index, depth + 1)
        if pieces is None or pieces.dtype != value.dtype:
            return _UNKNOWN
        return _Source(pieces, value.offset)


_UNKNOWN = object()


def _is_exact(step: Step, ref: TensorRef) -> bool:
    # A factor on the second operand may be fused into the addition. Integers are divided in the default dtype.
    packet = step.func.overloadpacket  # type: ignore[attr-defined]
    scaled = packet in _SUMS and (len(step.args) > 2 or step.kwargs.get("alpha", 1) != 1)
    numbers = [arg for arg in step.args if _is_number(arg)]
    # Of finite numbers only a quotient by zero is none, and the bits of that depend on the instructions.
    if not all(map(math.isfinite, numbers)) or (packet in _QUOTIENTS and 0 in numbers):
        return False
    dtypes = [ref.dtype, *(arg.dtype for arg in step.args if isinstance(arg, TensorRef))]
    return not scaled and "out" not in step.kwargs and all(dtype.is_floating_point for dtype in dtypes)


def _casts_exactly(source: torch.dtype, target: torch.dtype) -> bool:
    # What becomes of a number that an integer cannot hold depends on the instructions.
    if source == target:
        return True
    if source.is_floating_point:
        return target.is_floating_point
    return not source.is_complex


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _sources(write: _Write) -> list[_Source]:
    if isinstance(write, _Copy):
        return [write.source] if isinstance(write.source, _Source) else []
    return [arg for arg in write.args if isinstance(arg, _Source)] if isinstance(write, _Elementwise) else []
