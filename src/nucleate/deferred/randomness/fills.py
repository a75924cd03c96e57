"""Random fills: the draws that a fill takes, and the making of any part of a fill alone.

A random fill is `normal_` or `uniform_` over all elements of dense memory, one after the other. On the CPU each draw
makes one element: `uniform_` goes in order, `normal_` in groups of 16
(aten/src/ATen/native/cpu/DistributionTemplates.h, torch 2.13). So a slice can be made from the position in the stream
where its draws begin. On CUDA every thread has its own stream, and the number of elements decides which thread makes
which element. So a fill there is skipped or made whole. For each kind and dtype, one trial shows whether this build of
torch works as described.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred.randomness.mersenne_twister import draw
from nucleate.deferred.tape.steps import Step, TensorRef
from nucleate.deferred.torch_modes import plain_modes

aten = torch.ops.aten

#: `(offset, count)` -> the generator, `offset` draws behind the fill's first draw; the caller then takes `count` draws.
Seek = Callable[[int, int], torch.Generator]

#: `normal_` makes its numbers in groups of this size.
GROUP = 16

_UNIFORM = {aten.uniform_.default, aten.rand.default, aten.rand.generator}
_NORMAL = {aten.normal_.default, aten.randn.default, aten.randn.generator}
_IN_PLACE = {aten.uniform_.default, aten.normal_.default}
_HALF = (torch.bfloat16, torch.float16)
# Box-Muller with numbers of 24 bits (53 for float64) reaches at most sqrt(2 ln 2^24) = 5.77 (8.57) standard deviations.
_LARGEST_NORMAL = {torch.float32: 6.0, torch.bfloat16: 6.0, torch.float16: 6.0, torch.float64: 9.0}


@dataclass(frozen=True, slots=True)
class Fill:
    """A random fill.

    Attributes:
        is_normal: Whether it is `normal_`, else `uniform_`.
        first: The mean, or the lower bound.
        second: The standard deviation, or the upper bound.
        numel: The number of elements.
        dtype: The dtype of the elements.
    """

    is_normal: bool
    first: float
    second: float
    numel: int
    dtype: torch.dtype

    @property
    def draws_per_element(self) -> int:
        """The number of 32-bit draws that an element takes."""
        return 2 if self.dtype == torch.float64 else 1

    @property
    def num_draws(self) -> int:
        """The number of 32-bit draws that the whole fill takes on the CPU."""
        numel = self.numel
        if self.is_normal and numel % GROUP:
            numel = self._tail_start + GROUP
        return numel * self.draws_per_element

    @property
    def _tail_start(self) -> int:
        """The number of elements after which an incomplete last group is drawn, again and whole."""
        return self.numel - self.numel % GROUP if self.dtype in _HALF else self.numel

    def make(self, start: int, out: Tensor, seek: Seek) -> None:
        """Make the elements from `start` on.

        Args:
            start: The first element to make.
            out: The memory for the wanted elements, one-dimensional and contiguous.
            seek: A function of an offset from the fill's first draw and the number of draws that will be taken there;
                it returns the generator at that offset. Each further call is for a later place in the stream.
        """
        stop = start + out.numel()
        if not self.is_normal:
            if out.numel():
                out.uniform_(self.first, self.second, generator=self._seek(seek, start, out.numel()))
            return
        # The last 16 elements are a separate group if the number of elements is not a multiple of 16.
        body_stop = self.numel - GROUP if self.numel % GROUP else self.numel
        if start < body_stop:
            self._make_groups(start, out[: min(stop, body_stop) - start], seek)
        if stop > body_stop:
            tail = torch.empty(GROUP, dtype=self.dtype)
            tail.normal_(self.first, self.second, generator=self._seek(seek, self._tail_start, GROUP))
            begin = max(start, body_stop)
            out[begin - start :].copy_(tail[begin - body_stop : stop - body_stop])

    def _make_groups(self, start: int, out: Tensor, seek: Seek) -> None:
        """Make elements that all lie in whole groups, counted from the fill's first element."""
        stop = start + out.numel()
        first = start - start % GROUP
        middle, last = min(stop, -(-start // GROUP) * GROUP), stop - stop % GROUP
        if start != first:
            self._copy_group(first, start, middle, out[: middle - start], seek)
        if last > middle:
            whole = out[middle - start : last - start]
            whole.normal_(self.first, self.second, generator=self._seek(seek, middle, last - middle))
        if stop > max(last, middle):
            self._copy_group(last, last, stop, out[last - start :], seek)

    def _copy_group(self, group: int, start: int, stop: int, out: Tensor, seek: Seek) -> None:
        numbers = torch.empty(GROUP, dtype=self.dtype)
        numbers.normal_(self.first, self.second, generator=self._seek(seek, group, GROUP))
        out.copy_(numbers[start - group : stop - group])

    def _seek(self, seek: Seek, element: int, numel: int) -> torch.Generator:
        return seek(element * self.draws_per_element, numel * self.draws_per_element)


def fill_of(step: Step) -> Fill | None:
    """Return the random fill of a step, or None if the step is not a random fill of dense memory in order."""
    func = step.func
    kwargs = step.kwargs
    if func in _NORMAL or func in _UNIFORM:
        ref, is_normal = step.outputs[0], func in _NORMAL
        first, second = 0.0, 1.0
        if func in _IN_PLACE:
            names = ("mean", "std") if is_normal else ("from", "to")
            given = dict(zip(names, step.args[1:], strict=False)) | kwargs
            first, second = given.get(names[0], first), given.get(names[1], second)
    elif step.position is not None and _is_trunc_normal(func):
        ref, first, second, lower, upper = step.args[:5]
        is_normal = True
        reach = _LARGEST_NORMAL.get(ref.dtype, math.inf) * second
        # `trunc_normal_` draws numbers outside the bounds again. If none can be outside, it is a plain `normal_`.
        if (
            not second > 0
            or not (lower <= first - reach and first + reach <= upper)
            or not _truncates_by_rejection(func)
        ):
            return None
    else:
        return None
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in (first, second)):
        return None
    if ref.dtype not in _LARGEST_NORMAL or not is_contiguous(ref) or (is_normal and ref.numel < GROUP):
        return None
    return Fill(is_normal, float(first), float(second), ref.numel, ref.dtype)


def _is_trunc_normal(func: Any) -> bool:
    return getattr(func, "__name__", "") == "_no_grad_trunc_normal_"


@functools.cache
@plain_modes()
def _truncates_by_rejection(func: Any) -> bool:
    # `trunc_normal_` does so since torch 2.12. Before, it computed `erfinv_` of a uniform number.
    generator, twin = (torch.Generator().manual_seed(0) for _ in range(2))
    truncated = func(torch.empty(5 * GROUP, dtype=torch.float32), 0.5, 2.0, -20.0, 20.0, generator)
    return torch.equal(truncated, torch.empty(5 * GROUP, dtype=torch.float32).normal_(0.5, 2.0, generator=twin))


def is_contiguous(ref: TensorRef) -> bool:
    """Return whether the elements lie one after the other in the order of their indices."""
    expected = 1
    for length, stride in zip(reversed(ref.size), reversed(ref.stride), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


@functools.cache
@plain_modes()
def fills_as_described(is_normal: bool, dtype: torch.dtype) -> bool:
    """Return whether this build of torch draws as the module docstring says, tried once on fills of awkward sizes."""
    for numel in (GROUP, 5 * GROUP, 5 * GROUP + 5):
        fill = Fill(is_normal, 0.5, 2.0, numel, dtype)
        generator = torch.Generator().manual_seed(numel)
        before = generator.get_state()
        whole = torch.empty(numel, dtype=dtype)
        (whole.normal_ if is_normal else whole.uniform_)(0.5, 2.0, generator=generator)
        passed = torch.Generator()
        passed.set_state(before)
        draw(passed, fill.num_draws)
        if not torch.equal(generator.get_state(), passed.get_state()):
            return False

        def seek(offset: int, count: int, before: Tensor = before) -> torch.Generator:
            generator = torch.Generator()
            generator.set_state(before)
            draw(generator, offset)
            return generator

        for start, stop in ((0, numel), (GROUP, numel), (3, 9), (GROUP + 3, numel), (numel - 7, numel - 1)):
            part = torch.empty(max(0, stop - start), dtype=dtype)
            fill.make(start, part, seek)
            if not torch.equal(part, whole[start:stop]):
                return False
    return True
