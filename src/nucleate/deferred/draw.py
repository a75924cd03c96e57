"""How a generator's state behind a random step is found: by drawing what the step draws, into scratch memory.

This is the seam for random access: whoever can say how far a step moves a generator may jump there instead.
A plain fill is drawn in pieces that stay in the processor's cache, so that passing over a parameter takes neither
its memory nor the time to touch it.
"""

from __future__ import annotations

from typing import Any

import torch

from nucleate.deferred.tape import Step, TensorRef

aten = torch.ops.aten

#: Elements per piece. Any multiple of 16 will do: `normal_` makes its numbers in groups of 16
#: (aten/src/ATen/native/cpu/DistributionTemplates.h, `normal_fill`, torch 2.13).
PIECE = 1 << 15
_GROUP = 16

# Fills whose use of randomness depends only on how many elements of which dtype they fill, if these are contiguous.
_PLAIN_FILLS = {aten.uniform_.default, aten.normal_.default}
# `rand` and `randn` allocate and fill (aten/src/ATen/native/TensorFactories.cpp).
_FACTORIES: dict[Any, Any] = {
    aten.rand.default: aten.uniform_.default,
    aten.randn.default: aten.normal_.default,
    aten.rand.generator: aten.uniform_.default,
    aten.randn.generator: aten.normal_.default,
}


def draw_plain_fill(step: Step, generator: torch.Generator) -> bool:
    """Draw what a plain fill on the CPU draws, if `step` is one.

    Args:
        step: A random step.
        generator: The generator, in the state before the step; it is moved behind it.

    Returns:
        Whether the step is a plain fill. If not, nothing was drawn.
    """
    func = _FACTORIES.get(step.func, step.func)
    if func not in _PLAIN_FILLS or generator.device.type != "cpu":
        return False
    ref = step.outputs[0]
    if not _is_contiguous(ref):
        return False
    scratch = torch.empty(min(ref.numel, PIECE + _GROUP), dtype=ref.dtype)
    left = ref.numel
    while left > 0:
        # The last piece keeps at least a whole group: a shorter fill would draw in another way.
        count = left if left <= PIECE + _GROUP else PIECE
        func(scratch[:count], 0.0, 1.0, generator=generator)
        left -= count
    return True


def _is_contiguous(ref: TensorRef) -> bool:
    expected = 1
    for length, stride in zip(reversed(ref.size), reversed(ref.stride), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True
