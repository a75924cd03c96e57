"""The part of a tensor that a rank holds, found a second time, by torch's own placements, for verification.

`placements.py` computes boxes. This file splits lists of indices with the methods of torch's placements, as
`fully_shard` and `distribute_tensor` split tensors. The two share no code, so that one notices a fault of the other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def indices_of(tensor: Any) -> list[Tensor]:
    """Return the indices of each dim that this rank holds of a DTensor, int64 `(length,)`, in the order in its memory.

    Args:
        tensor: The DTensor. It has a value for each combination of these indices.
    """
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    found = []
    for dim, length in enumerate(tensor.shape):
        indices = torch.arange(length)
        if coordinate is None:
            found.append(indices[:0])
            continue
        axes = [axis for axis, placement in enumerate(tensor.placements) if getattr(placement, "dim", None) == dim]
        # FSDP2 splits what other axes have left, and notes the number of their parts
        # (`_init_sharding_spec_tp` in torch/distributed/fsdp/_fully_shard/_fsdp_param.py, 2.13).
        last = [axis for axis in axes if _splits_last(tensor, axis, axes)]
        for axis in [*(axis for axis in axes if axis not in last), *reversed(last)]:
            placement = tensor.placements[axis]
            if axis in last:
                shares = list(torch.chunk(indices, mesh.size(axis)))
                indices = shares[coordinate[axis]] if coordinate[axis] < len(shares) else indices[:0]
            else:
                along = type(placement)(0, **_options(placement))
                indices = along._split_tensor(indices, mesh.size(axis), with_padding=False)[0][coordinate[axis]]
        found.append(indices)
    return found


def _splits_last(tensor: Any, axis: int, axes: list[int]) -> bool:
    parts = getattr(tensor.placements[axis], "split_factor", 1)
    return parts > 1 and parts == math.prod(tensor.device_mesh.size(other) for other in axes if other > axis)


def _options(placement: Any) -> dict[str, int]:
    parts = getattr(placement, "split_factor", None)
    return {} if parts is None else {"split_factor": int(parts)}
