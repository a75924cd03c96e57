"""How a generator's state behind a random step is found: by drawing as many numbers as the step draws.

This is the seam for random access: whoever can say how far a step moves a generator may jump there instead. A plain
fill on the CPU moves it by a number of 32-bit draws that its size and dtype tell; these are drawn in the cheapest way
torch has, into scratch memory that stays in the processor's cache.
"""

from __future__ import annotations

import functools

import torch

from nucleate.deferred.tape import Step, TensorRef

aten = torch.ops.aten

#: Elements of scratch memory.
PIECE = 1 << 14

# `normal_` makes its numbers in groups of 16, and in another way where there is no whole group
# (aten/src/ATen/native/cpu/DistributionTemplates.h, `normal_fill`, torch 2.13).
_GROUP = 16
_UNIFORM = {aten.uniform_.default, aten.rand.default, aten.rand.generator}
_NORMAL = {aten.normal_.default, aten.randn.default, aten.randn.generator}
_HALF = (torch.bfloat16, torch.float16)


def draw_plain_fill(step: Step, generator: torch.Generator) -> bool:
    """Draw what a plain fill on the CPU draws, if `step` is one.

    Args:
        step: A random step.
        generator: The generator, in the state before the step; it is moved behind it.

    Returns:
        Whether the step is a plain fill. If not, nothing was drawn.
    """
    if generator.device.type != "cpu" or (step.func not in _UNIFORM and step.func not in _NORMAL):
        return False
    ref, is_normal = step.outputs[0], step.func in _NORMAL
    if not ref.dtype.is_floating_point or not _is_contiguous(ref) or (is_normal and ref.numel < _GROUP):
        return False
    if not predicts(is_normal, ref.dtype):
        return False
    _draw(_num_draws(ref.numel, is_normal, ref.dtype), generator)
    return True


@functools.cache
def predicts(is_normal: bool, dtype: torch.dtype) -> bool:
    """Return whether this torch build draws as predicted, tried once on a fill that is no multiple of anything.

    Args:
        is_normal: Whether to try `normal_`, else `uniform_`.
        dtype: What to fill.
    """
    real, predicted = (torch.Generator().manual_seed(0) for _ in range(2))
    tensor = torch.empty(3 * _GROUP + 5, dtype=dtype)
    (tensor.normal_ if is_normal else tensor.uniform_)(generator=real)
    _draw(_num_draws(tensor.numel(), is_normal, dtype), predicted)
    return torch.equal(real.get_state(), predicted.get_state())


def _num_draws(numel: int, is_normal: bool, dtype: torch.dtype) -> int:
    """Return how many 32-bit numbers a fill draws."""
    rest = numel % _GROUP
    if is_normal and rest:
        # The last group is drawn again, whole, where it is not complete; half precision rounds up instead.
        numel += _GROUP - rest if dtype in _HALF else _GROUP
    return 2 * numel if dtype == torch.float64 else numel


def _draw(count: int, generator: torch.Generator) -> None:
    # A 64-bit integer takes two draws and little else.
    pairs = torch.empty(min(count // 2, PIECE), dtype=torch.int64)
    for start in range(0, count // 2, PIECE):
        pairs[: count // 2 - start].random_(generator=generator)
    if count % 2:
        torch.empty(1, dtype=torch.uint8).random_(generator=generator)


def _is_contiguous(ref: TensorRef) -> bool:
    expected = 1
    for length, stride in zip(reversed(ref.size), reversed(ref.stride), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True
