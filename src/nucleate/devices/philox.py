"""CUDA's generator, Philox: a seed and an offset, to which every operation adds the draws of one of its threads.

Source: `calc_execution_policy` in aten/src/ATen/native/cuda/DistributionTemplates.h, torch 2.13. To skip a fill, add to
the offset. One trial for each kind of fill and each dtype checks the addition on this device and build.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_THREADS_PER_BLOCK = 256
# The number of values that one call of the engine gives.
_COUNTERS_PER_CALL = 4


def distance(is_normal: bool, numel: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """Return the number that a fill adds to the offset, or None where it is not known.

    Args:
        is_normal: Whether the fill is `normal_`; else it is `uniform_`.
        numel: The number of elements.
        dtype: The dtype of the elements.
        device: A CUDA device, with its index.
    """
    if numel == 0:
        return 0
    # Larger tensors are filled in several kernels (`can_use_32bit_indexing`).
    if numel * dtype.itemsize >= 2**31 or not adds_as_described(is_normal, dtype, device):
        return None
    return _increment(numel, dtype, device)


def moved(state: Tensor, distance: int) -> Tensor:
    """Return the state with `distance` added to its offset."""
    state = state.clone()
    state.view(torch.int64)[1] += distance
    return state


def _increment(numel: int, dtype: torch.dtype, device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    return increment(numel, dtype, properties.multi_processor_count, properties.max_threads_per_multi_processor)


def increment(numel: int, dtype: torch.dtype, num_processors: int, threads_per_processor: int) -> int:
    """Return the number that a fill adds to the offset, on a device with these numbers of processors and threads."""
    unroll = 2 if dtype == torch.float64 else 4
    blocks_per_processor = threads_per_processor // _THREADS_PER_BLOCK
    blocks = min(num_processors * blocks_per_processor, (numel + _THREADS_PER_BLOCK - 1) // _THREADS_PER_BLOCK)
    return ((numel - 1) // (_THREADS_PER_BLOCK * blocks * unroll) + 1) * _COUNTERS_PER_CALL


@functools.cache
def adds_as_described(is_normal: bool, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether this torch build and device add to the offset as `increment` computes."""
    generator = torch.Generator(device)
    for numel in (1, 16, 1000, 257 * 1024, 5_000_011):
        generator.manual_seed(0)
        before = generator.get_state()
        tensor = torch.empty(numel, dtype=dtype, device=device)
        (tensor.normal_ if is_normal else tensor.uniform_)(generator=generator)
        if not torch.equal(generator.get_state(), moved(before, _increment(numel, dtype, device))):
            return False
    return True
