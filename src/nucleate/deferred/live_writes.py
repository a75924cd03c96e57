"""Live writes: the steps of a tape that still matter to a storage, read backward, as pieces if they are such.

Only operations on finite numbers whose result IEEE 754 defines to the last bit are taken: torch computes others
differently in the vectorized and in the remaining part of a loop, so that a range would depend on where it begins.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch

from nucleate.deferred.fills import fill_of, fills_as_described, is_contiguous
from nucleate.deferred.given import take
from nucleate.deferred.pieces import Computed, Copied, Drawn, Filled, Joined, Pieces, Read, Source, Write
from nucleate.deferred.random_program import RandomProgram
from nucleate.deferred.tape import Constant, Step, Tape, TensorRef

aten = torch.ops.aten

# Deeper chains, and storages that are written bit by bit, are replayed whole.
_MAX_DEPTH = 32
_MAX_WRITES = 256
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


def pieces_of(tape: Tape, program: RandomProgram, storage: int, end: int | None = None) -> Pieces | None:
    """Return how ranges of a storage are made, or None if it can only be made whole.

    Args:
        tape: The tape.
        program: The random program of its steps.
        storage: The storage's number on the tape.
        end: As it was before the step with this index; by default, as it is at the end.
    """
    pieces = _Reader(tape, program).pieces(storage, len(tape.steps) if end is None else end, 0)
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
        writes: list[Write] = []
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

    def _write(self, step: Step, ref: TensorRef, depth: int) -> Write | None:
        start, stop = ref.offset, ref.offset + ref.numel
        fill = fill_of(step)
        if fill is not None:
            assert step.position is not None
            if step.position.run.device != "cpu" or not fills_as_described(fill.is_normal, fill.dtype):
                return None
            return Drawn(start, stop, True, fill, step.position)
        if step.func is take:
            return Read(start, stop, True, step.args[1])
        packet = getattr(step.func, "overloadpacket", None)
        if packet is aten.zero_:
            return Filled(start, stop, True, 0)
        if packet is aten.fill_ and _is_number(step.args[1]):
            return Filled(start, stop, True, step.args[1])
        if packet in _CONSTANTS:
            return Filled(start, stop, True, _CONSTANTS[packet])
        if packet in _FULL and _is_number(step.args[_FULL[packet]]):
            return Filled(start, stop, True, step.args[_FULL[packet]])
        if packet is aten.copy_:
            return self._copy(start, step.args[1], step, ref, depth)
        if packet in _COPIES and isinstance(step.args[0], TensorRef):
            return self._copy(start, step.args[0], step, ref, depth)
        if packet is aten.cat or packet is aten.stack:
            return self._join(step, ref, depth)
        if packet in _EXACT or packet in _EXACT_IN_PLACE:
            in_place = packet in _EXACT_IN_PLACE
            if (in_place and step.args[0] != ref) or not _is_exact(step, ref):
                return None
            args = [self._argument(arg, step, ref, depth) for arg in islice(step.args, int(in_place), None)]
            kwargs = {name: self._argument(arg, step, ref, depth) for name, arg in step.kwargs.items()}
            if any(arg is _UNKNOWN for arg in (*args, *kwargs.values())):
                return None
            if any(isinstance(arg, Source) for arg in kwargs.values()):
                return None
            # Zeros of both signs are equal, and which of them is the larger one depends on the instructions.
            if packet not in _ARITHMETIC and any(isinstance(arg, Source) for arg in args[int(not in_place) :]):
                return None
            return Computed(start, stop, not in_place, step.func, args, kwargs)
        return None

    def _copy(self, start: int, value: Any, step: Step, ref: TensorRef, depth: int) -> Write | None:
        stop = start + ref.numel
        if isinstance(value, Constant):
            tensor = value.tensor
            plain = tensor.layout == torch.strided and tensor.shape == ref.size and tensor.device.type == "cpu"
            if not plain or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
                return None
            # What is done to a NaN keeps or loses its payload, depending on the instructions.
            if not _casts_exactly(tensor.dtype, ref.dtype) or not bool(tensor.detach().isfinite().all()):
                return None
            return Copied(start, stop, True, value)
        source = self._argument(value, step, ref, depth)
        if not isinstance(source, Source) or not _casts_exactly(source.pieces.dtype, ref.dtype):
            return None
        only = source.pieces.writes[0]
        is_read = len(source.pieces.writes) == 1 and isinstance(only, Read) and only.given.dtype == source.pieces.dtype
        if is_read and only.start <= source.start and source.start + ref.numel <= only.stop:
            # Straight from where it is given, without a copy on the way.
            assert isinstance(only, Read)
            return Read(start, stop, True, only.given, only.first + source.start - only.start)
        return Copied(start, stop, True, source)

    def _join(self, step: Step, ref: TensorRef, depth: int) -> Write | None:
        """Return the write of `cat` or `stack`: a row up to their dimension takes of each tensor what is behind it."""
        values = step.args[0]
        dim = step.args[1] if len(step.args) > 1 else step.kwargs.get("dim", 0)
        dim += len(ref.size) if dim < 0 else 0
        if "out" in step.kwargs:
            return None
        num_rows = math.prod(ref.size[:dim])
        sources, bounds = [], [0]
        for value in values:
            if isinstance(value, Constant) and not value.tensor.numel():
                continue
            source = self._source(value, step, ref, depth) if isinstance(value, TensorRef) else None
            if source is None or source.pieces.dtype != ref.dtype:
                return None
            sources.append(source)
            bounds.append(bounds[-1] + value.numel // num_rows)
        return Joined(ref.offset, ref.offset + ref.numel, True, sources, bounds) if sources else None

    def _argument(self, value: Any, step: Step, ref: TensorRef, depth: int) -> Any:
        """Return a number as it is and a tensor of the written one's shape as a source."""
        if value is None or _is_number(value):
            return value
        if not isinstance(value, TensorRef) or value.size != ref.size:
            return _UNKNOWN
        source = self._source(value, step, ref, depth)
        return _UNKNOWN if source is None else source

    def _source(self, value: TensorRef, step: Step, ref: TensorRef, depth: int) -> Source | None:
        """Return where a tensor that a step reads lies, if ranges of it can be made."""
        # On the storage that is written it would be the old value.
        if value.conj or value.neg or not is_contiguous(value) or value.storage == ref.storage:
            return None
        pieces = self.pieces(value.storage, step.index, depth + 1)
        return None if pieces is None or pieces.dtype != value.dtype else Source(pieces, value.offset)


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
