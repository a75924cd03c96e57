"""Live writes: the steps of a tape that still matter to a storage, read backward into a range maker if possible.

A range maker uses only operations on finite numbers whose result IEEE 754 defines to the last bit. Torch computes other
operations differently in the vectorized and in the remaining part of a loop, so the values of a range would depend on
where it begins.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from nucleate.deferred.elements.element_source import ElementSource, fill_from
from nucleate.deferred.randomness.fills import fill_of, fills_as_described, is_contiguous
from nucleate.deferred.randomness.program import RandomProgram
from nucleate.deferred.replay.ranges import RangeMaker
from nucleate.deferred.replay.strided import coalesced, composed
from nucleate.deferred.replay.writes import Computed, Copied, Derived, Drawn, Filled, Joined, Read, TensorView, Write
from nucleate.deferred.tape.steps import Constant, Step, TensorRef
from nucleate.deferred.tape.tape import Tape

aten = torch.ops.aten

# Deeper chains, and storages with more writes, are replayed whole.
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


def maker_of(tape: Tape, program: RandomProgram, storage: int, end: int | None = None) -> RangeMaker | None:
    """Return the range maker of a storage, or None if the storage can only be made whole.

    Args:
        tape: The tape.
        program: The random program of its steps.
        storage: The storage's number on the tape.
        end: Make the storage as it was before the step with this index; by default, as it is at the end.
    """
    bound = _bound(tape, program, storage) if end is None else None
    if bound is not None:
        return bound
    maker = _Reader(tape, program).maker(storage, len(tape.steps) if end is None else end, 0)
    if maker is None or not maker.numel:
        return None
    maker.prepare()
    return maker


def _bound(tape: Tape, program: RandomProgram, storage: int) -> RangeMaker | None:
    """Return the range maker of a storage that only an element source gives its value, or None. Models have many."""
    writers = tape.writers(storage)
    step = tape.steps[writers[-1]] if writers else None
    if step is None or step.func is not fill_from or not step.args:
        return None
    ref, given = step.args
    if not ref.size or not ref.numel or ref.conj or ref.neg or isinstance(given, Derived):
        return None
    if not is_contiguous(ref) or not ref.fills(tape.size_bytes(storage)):
        return None
    return RangeMaker(program, ref.numel, ref.dtype, [Read(0, ref.numel, True, given)])


def source_of(tape: Tape, program: RandomProgram, ref: TensorRef, end: int) -> TensorView | None:
    """Return the view that ranges of a tensor are read from, or None if its storage can only be made whole.

    Args:
        tape: The tape.
        program: The random program of its steps.
        ref: The tensor.
        end: Read the tensor as it was before the step with this index.
    """
    source = _Reader(tape, program).source(ref, end, 0)
    if source is None or not source.maker.numel:
        return None
    source.maker.prepare()
    return source


class _Reader:
    """A reader of the live writes of one storage and of the storages that it depends on."""

    def __init__(self, tape: Tape, program: RandomProgram) -> None:
        self._tape = tape
        self._program = program
        self._seen: dict[tuple[int, int], RangeMaker | None] = {}

    def maker(self, storage: int, end: int, depth: int) -> RangeMaker | None:
        """Return the range maker of a storage as it was before the step `end`, or None."""
        places = [place for place in self._tape.writers(storage) if place < end]
        if not places or depth > _MAX_DEPTH:
            return None
        key = (storage, places[-1])
        if key in self._seen:
            # A storage that is used twice would be made twice. That costs nothing if elements are only moved.
            known = self._seen[key]
            return known if known is not None and known.is_moved else None
        self._seen[key] = None
        self._seen[key] = found = self._pieces(storage, places, depth)
        return found

    def _pieces(self, storage: int, places: list[int], depth: int) -> RangeMaker | None:
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
            if ref.dtype != dtype or ref.conj or ref.neg or not ref.size:
                return None
            if not ref.numel and storage not in step.creates:
                continue
            order = _order(ref)
            start, stop = ref.offset, ref.offset + ref.numel
            if order is None:
                write = self._write_columns(step, ref, depth)
                if write is None:
                    return None
                writes.append(write)
                continue
            # A write is dead if a later write replaces it without reading it.
            dead = any(later.blind and later.start <= start and stop <= later.stop for later in writes)
            if not dead and not (storage in step.creates and step.uninitialized):
                write = self._write(step, ref, order, depth)
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
        if not writes:
            return None
        maker = RangeMaker(self._program, size_bytes // dtype.itemsize, dtype, writes[::-1])
        # Each chunk of a transposed file would read nearly the whole file.
        return maker if maker.is_moved or maker.grain == 1 else None

    def _write_columns(self, step: Step, ref: TensorRef, depth: int) -> Write | None:
        """Return the write of a copy into some columns of consecutive rows, or None for any other step."""
        lengths, steps = coalesced(ref.size, ref.stride)
        if len(lengths) == 1 and lengths and steps[0] > 1:
            lengths, steps = (*lengths, 1), (*steps, 1)
        if len(lengths) != 2 or steps[1] != 1 or steps[0] < lengths[1]:
            return None
        packet = getattr(step.func, "overloadpacket", None)
        if step.func is fill_from:
            given: ElementSource = step.args[1]
            source = TensorView(RangeMaker.of(given, ref.dtype), 0)
        elif packet is aten.copy_ and isinstance(step.args[1], TensorRef) and step.args[1].size == ref.size:
            found = self._source(step.args[1], step, ref, depth)
            if found is None or not found.maker.is_moved or found.maker.dtype != ref.dtype:
                return None
            source = found
        else:
            return None
        width, column = steps[0], ref.offset % steps[0]
        if column + lengths[1] > width:
            return None
        start = ref.offset - column
        # The storage may end with the written columns of the last row.
        stop = ref.offset + (lengths[0] - 1) * width + lengths[1]
        return Joined(start, stop, False, [source], [column, column + lengths[1]], width)

    def _write(self, step: Step, ref: TensorRef, order: tuple[int, ...], depth: int) -> Write | None:
        start, stop = ref.offset, ref.offset + ref.numel
        packet = getattr(step.func, "overloadpacket", None)
        if order != tuple(range(len(order))):
            # The elements do not lie in the order of their indices, such as in a copy of a transposed tensor.
            if step.func is fill_from:
                given: ElementSource = step.args[1]
                whole = replace(ref, stride=tuple(math.prod(ref.size[dim + 1 :]) for dim in range(len(ref.size))))
                size, stride = (tuple(each[dim] for dim in order) for each in (whole.size, whole.stride))
                return Copied(start, stop, True, TensorView(RangeMaker.of(given, given.dtype), 0, size, stride))
            value = step.args[1] if packet is aten.copy_ else step.args[0] if packet in _COPIES else None
            return self._copy(start, value, step, ref, order, depth) if isinstance(value, TensorRef) else None
        fill = fill_of(step)
        if fill is not None:
            assert step.position is not None
            if step.position.run.device != "cpu" or not fills_as_described(fill.is_normal, fill.dtype):
                return None
            return Drawn(start, stop, True, fill, step.position)
        if step.func is fill_from:
            return Read(start, stop, True, step.args[1])
        if packet is aten.zero_:
            return Filled(start, stop, True, 0)
        if packet is aten.fill_ and _is_number(step.args[1]):
            return Filled(start, stop, True, step.args[1])
        if packet in _CONSTANTS:
            return Filled(start, stop, True, _CONSTANTS[packet])
        if packet in _FULL and _is_number(step.args[_FULL[packet]]):
            return Filled(start, stop, True, step.args[_FULL[packet]])
        if packet is aten.copy_:
            return self._copy(start, step.args[1], step, ref, order, depth)
        if packet in _COPIES and isinstance(step.args[0], TensorRef):
            return self._copy(start, step.args[0], step, ref, order, depth)
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
            if any(isinstance(arg, TensorView) for arg in kwargs.values()):
                return None
            # Zeros of both signs are equal, and the instructions decide which zero counts as the larger one.
            if packet not in _ARITHMETIC and any(isinstance(arg, TensorView) for arg in args[int(not in_place) :]):
                return None
            return Computed(start, stop, not in_place, step.func, args, kwargs)
        return None

    def _copy(
        self, start: int, value: Any, step: Step, ref: TensorRef, order: tuple[int, ...], depth: int
    ) -> Write | None:
        stop = start + ref.numel
        if isinstance(value, Constant):
            tensor = value.tensor
            plain = tensor.layout == torch.strided and tensor.shape == ref.size and tensor.device.type == "cpu"
            if not plain or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
                return None
            # Operations on a NaN keep or lose its payload, depending on the instructions.
            if not _casts_exactly(tensor.dtype, ref.dtype) or not bool(tensor.detach().isfinite().all()):
                return None
            return Copied(start, stop, True, value)
        if not isinstance(value, TensorRef) or value.size != ref.size:
            return None
        size, stride = (tuple(each[dim] for dim in order) for each in (value.size, value.stride))
        source = self._source(replace(value, size=size, stride=stride), step, ref, depth)
        if source is None or not _casts_exactly(source.maker.dtype, ref.dtype):
            return None
        only = source.maker.writes[0]
        is_read = len(source.maker.writes) == 1 and isinstance(only, Read) and only.given.dtype == source.maker.dtype
        if source.size is None and is_read and only.start <= source.start and source.start + ref.numel <= only.stop:
            # Read directly from the element source, without a copy in between.
            assert isinstance(only, Read)
            return Read(start, stop, True, only.given, only.first + source.start - only.start)
        return Copied(start, stop, True, source)

    def _join(self, step: Step, ref: TensorRef, depth: int) -> Write | None:
        """Return the write of `cat` or `stack`: each row holds one part of each tensor, side by side."""
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
            if isinstance(value, TensorRef) and not value.numel:
                continue
            source = self._source(value, step, ref, depth) if isinstance(value, TensorRef) else None
            if source is None or source.maker.dtype != ref.dtype:
                return None
            sources.append(source)
            bounds.append(bounds[-1] + value.numel // num_rows)
        if not sources:
            return None
        return Joined(ref.offset, ref.offset + ref.numel, True, sources, bounds, bounds[-1])

    def _argument(self, value: Any, step: Step, ref: TensorRef, depth: int) -> Any:
        """Return a number as it is, a tensor of the written one's shape as a view, and `_UNKNOWN` for anything else."""
        if value is None or _is_number(value):
            return value
        if not isinstance(value, TensorRef) or value.size != ref.size:
            return _UNKNOWN
        # Each chunk of a tensor that does not lie in order would read nearly the whole tensor.
        source = self._source(value, step, ref, depth) if is_contiguous(value) else None
        return _UNKNOWN if source is None else source

    def _source(self, value: TensorRef, step: Step, ref: TensorRef, depth: int) -> TensorView | None:
        """Return the view of a tensor that a step reads, or None if its ranges cannot be made."""
        # A tensor on the written storage would have the old value.
        return None if value.storage == ref.storage else self.source(value, step.index, depth + 1)

    def source(self, value: TensorRef, end: int, depth: int) -> TensorView | None:
        """Return the view of a tensor as it was before the step `end`, or None if its ranges cannot be made."""
        maker = None if value.conj or value.neg else self.maker(value.storage, end, depth)
        if maker is None or maker.dtype != value.dtype:
            return None
        if is_contiguous(value):
            return TensorView(maker, value.offset)
        # In a random stream, all numbers in between would be drawn again and again.
        if not maker.is_moved:
            return None
        inner = maker.viewed()
        if inner is not None and inner.size is not None:
            one = composed(value.offset, value.size, value.stride, inner.size, inner.stride)
            if one is not None:
                return TensorView(inner.maker, inner.start + one[0], *one[1:])
        return TensorView(maker, value.offset, value.size, value.stride)


_UNKNOWN = object()


def _order(ref: TensorRef) -> tuple[int, ...] | None:
    """Return the order of dims in which the elements lie one after the other, or None if no order does that."""
    if is_contiguous(ref):
        return tuple(range(len(ref.size)))
    # Dims of size 1 come first, so that their strides do not matter.
    order = sorted(range(len(ref.size)), key=lambda dim: (ref.size[dim] != 1, -ref.stride[dim]))
    size, stride = (tuple(each[dim] for dim in order) for each in (ref.size, ref.stride))
    return tuple(order) if is_contiguous(replace(ref, size=size, stride=stride)) else None


def _is_exact(step: Step, ref: TensorRef) -> bool:
    # A factor on the second operand may be fused into the addition. Integers are divided in the default dtype.
    packet = step.func.overloadpacket  # type: ignore[attr-defined]
    scaled = packet in _SUMS and (len(step.args) > 2 or step.kwargs.get("alpha", 1) != 1)
    numbers = [arg for arg in step.args if _is_number(arg)]
    # With finite numbers, only a quotient by zero can be a NaN, whose bits depend on the instructions.
    if not all(map(math.isfinite, numbers)) or (packet in _QUOTIENTS and 0 in numbers):
        return False
    dtypes = [ref.dtype, *(arg.dtype for arg in step.args if isinstance(arg, TensorRef))]
    return not scaled and "out" not in step.kwargs and all(dtype.is_floating_point for dtype in dtypes)


def _casts_exactly(source: torch.dtype, target: torch.dtype) -> bool:
    # If an integer cannot hold a number, the result of the cast depends on the instructions.
    if source == target:
        return True
    if source.is_floating_point:
        return target.is_floating_point
    return not source.is_complex


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))
