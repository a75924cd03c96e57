"""CUDA's generator, Philox: a seed and an offset, to which every operation adds what one of its threads draws.

Source: `calc_execution_policy` in aten/src/ATen/native/cuda/DistributionTemplates.h, torch 2.13. Passing over a fill
is an addition; whether it is the right one for this device and build is tried once for each kind and dtype.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nucleate.deferred.fills import Fill
from nucleate.deferred.plain import plain_modes

_THREADS_PER_BLOCK = 256
# What one call of the engine gives.
_COUNTERS_PER_CALL = 4


def distance(fill: Fill, device: torch.device) -> int | None:
    """Return what a fill adds to the offset, or None where that is not known."""
    if fill.numel == 0:
        return 0
    # Larger tensors are filled in several kernels (`can_use_32bit_indexing`).
    if fill.numel * fill.dtype.itemsize >= 2**31 or not _adds_as_described(fill.is_normal, fill.dtype, device):
        return None
    return _increment(fill.numel, fill.dtype, device)


def moved(state: Tensor, distance: int) -> Tensor:
    """Return a state with a larger offset."""
    state = state.clone()
    state.view(torch.int64)[1] += distance
    return state


def _increment(numel: int, dtype: torch.dtype, device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    unroll = 2 if dtype == torch.float64 else 4
    blocks_per_processor = properties.max_threads_per_multi_processor // _THREADS_PER_BLOCK
    blocks = min(
        properties.multi_processor_count * blocks_per_processor,
        (numel + _THREADS_PER_BLOCK - 1) // _THREADS_PER_BLOCK,
    )
    return ((numel - 1) // (_THREADS_PER_BLOCK * blocks * unroll) + 1) * _COUNTERS_PER_CALL


@functools.cache
@plain_modes()
def _adds_as_described(is_normal: bool, dtype: torch.dtype, device: torch.device) -> bool:
    generator = torch.Generator(device)
    for numel in (1, 16, 1000, 257 * 1024, 5_000_011):
        generator.manual_seed(0)
        before = generator.get_state()
        tensor = torch.empty(numel, dtype=dtype, device=device)
        (tensor.normal_ if is_normal else tensor.uniform_)(generator=generator)
        if not torch.equal(generator.get_state(), moved(before, _increment(numel, dtype, device))):
            return False
    return True
