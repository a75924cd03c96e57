"""Placements: the part of a tensor that this rank holds, for DTensors of any placement, as boxes and as ranges.

A method for torch.distributed.checkpoint identifies a DTensor. A test of the class would import
torch.distributed.tensor, also where nothing is distributed, and the import takes longer than constructing most models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor."""
    return hasattr(tensor, "__create_chunk_list__")


def offsets_of(shard: Any) -> tuple[int, ...] | None:
    """Return the first index of this rank's part of a DTensor, or None if the part is not a box of the whole."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if hasattr(shard._local_tensor, "__create_chunk_list__") or any(map(_is_partial, shard.placements)):
        # The shard consists of several parts, or the function below refuses it.
        chunks = shard.__create_chunk_list__()
        if len(chunks) > 1:
            return None
        offsets = tuple(chunks[0].offsets) if chunks else (0,) * shard.dim()
    else:
        # `__create_chunk_list__` calls this function too (torch/distributed/tensor/_api.py, 2.13), but it first imports
        # torch.distributed.checkpoint for a class.
        _, offsets = compute_local_shape_and_global_offset(shard.shape, shard.device_mesh, shard.placements)
    for axis, placement in enumerate(shard.placements):
        # The part of a `_StridedShard` (torch/distributed/tensor/placement_types.py, 2.13) is a box if later axes split
        # the same dim into `split_factor` parts. Else it consists of several separate parts.
        split_factor = getattr(placement, "split_factor", 1)
        later = [
            shard.device_mesh.size(other)
            for other in range(axis + 1, len(shard.placements))
            if split_factor > 1 and shard.placements[other].is_shard(placement.dim)
        ]
        if split_factor != math.prod(later):
            return None
    return tuple(offsets)


def scattered(shard: Any, local: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """Return the boxes of a shard that consists of several boxes of the whole, each with its first index."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    ranges: list[list[tuple[int, int, int]]] = []
    for dim, length in enumerate(shard.shape):
        placements = [
            Replicate()
            if placement.is_replicate() or placement.dim != dim
            else _StridedShard(0, split_factor=placement.split_factor)
            if isinstance(placement, _StridedShard)
            else Shard(0)
            for placement in shard.placements
        ]
        places = torch.arange(length, device=local.device)
        mine: Any = distribute_tensor(places, shard.device_mesh, placements, src_data_rank=None)
        ranges.append(_ranges(mine.to_local().tolist()))
    boxes = []
    for parts in itertools.product(*ranges):
        values = local
        for dim, (_, begin, length) in enumerate(parts):
            values = values.narrow(dim, begin, length)
        boxes.append((tuple(begin for begin, _, _ in parts), values))
    return boxes


def flat_start(shard: Any) -> int | None:
    """Return the first element of this rank's part of a DTensor in the whole, or None if the part is not one range."""
    offsets = offsets_of(shard)
    if offsets is None:
        return None
    whole, first, _ = merged(shard.shape, offsets, shard.to_local().shape)
    return first[0] if len(whole) == 1 else None


def cut(shard: Any, whole: Tensor) -> Tensor:
    """Return this rank's part of a whole value.

    Args:
        shard: A DTensor of the shape of the whole.
        whole: The whole value.
    """
    offsets = offsets_of(shard)
    if offsets is None:
        from torch.distributed.tensor import distribute_tensor

        part: Any = distribute_tensor(whole, shard.device_mesh, shard.placements, src_data_rank=None)
        return part.to_local()  # type: ignore[no-any-return]
    for dim, (offset, length) in enumerate(zip(offsets, shard.to_local().shape, strict=True)):
        whole = whole.narrow(dim, offset if length else 0, length)
    return whole


def zeros_beside(parameter: Tensor, shape: torch.Size, dtype: torch.dtype, dims: list[int]) -> Tensor:
    """Return zeros on the mesh of a sharded parameter, sharded like the parameter in the dims that allow it.

    Args:
        parameter: A sharded tensor.
        shape: The whole shape of the result, such as that of one statistic for each row of the parameter.
        dtype: The dtype of the result.
        dims: The dims in which the result may be sharded.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    assert isinstance(parameter, DTensor)
    whole = torch.zeros(shape, dtype=dtype, device=parameter.to_local().device)
    everywhere = [Replicate()] * parameter.device_mesh.ndim
    wanted = [
        placement if isinstance(placement, (Shard, _StridedShard)) and placement.dim in dims else Replicate()
        for placement in parameter.placements
    ]
    return DTensor.from_local(whole, parameter.device_mesh, everywhere, run_check=False).redistribute(placements=wanted)


# -- boxes and ranges ---------------------------------------------------------------------------------------


def merged(
    shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Merge each dim that the box covers into the dim before it."""
    whole, first, size = [1], [0], [1]
    for length, offset, wanted in zip(shape, offsets, sizes, strict=True):
        covers = wanted == length
        if covers or whole[-1] == 1:
            whole[-1], first[-1], size[-1] = whole[-1] * length, first[-1] * length + offset, size[-1] * wanted
        else:
            whole.append(length)
            first.append(offset)
            size.append(wanted)
    return whole, first, size


def runs(begin: Sequence[int], shape: Sequence[int], whole: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a box in a tensor that is stored row by row, as (first element, number of elements).

    Args:
        begin: The box's first index in each dim.
        shape: The box's shape; not empty.
        whole: The tensor's shape.

    Examples:
        >>> list(runs((1, 0), (2, 4), (5, 4)))  # rows: one run
        [(4, 8)]
        >>> list(runs((0, 2), (2, 2), (2, 4)))  # columns
        [(2, 2), (6, 2)]
    """
    inner = len(shape)
    while inner > 0 and shape[inner - 1] == whole[inner - 1]:
        inner -= 1
    # The box covers the dims from `inner` on, so the dim before them is one range for each index of the dims before it.
    outer = max(0, inner - 1)
    strides = [math.prod(whole[dim + 1 :]) for dim in range(len(whole))]
    numel = math.prod(shape[outer:])
    last = sum(first * stride for first, stride in zip(begin[outer:], strides[outer:], strict=True))
    for index in itertools.product(*(range(b, b + n) for b, n in zip(begin[:outer], shape[:outer], strict=True))):
        yield last + sum(place * stride for place, stride in zip(index, strides, strict=False)), numel


def _is_partial(placement: Any) -> bool:
    return bool(placement.is_partial())


def _ranges(places: list[int]) -> list[tuple[int, int, int]]:
    """Return runs of consecutive numbers as (first number, its position, length)."""
    runs: list[tuple[int, int, int]] = []
    for position, place in enumerate(places):
        if runs and place == runs[-1][0] + runs[-1][2]:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((place, position, 1))
    return runs
