"""Shards: what of a tensor this rank holds, for DTensors of any placement, and the memory it has.

DTensors are told by what they offer to torch.distributed.checkpoint: asking by class would import
torch.distributed.tensor, which takes longer than most models, also where nothing is distributed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nucleate.deferred.fills import is_contiguous
from nucleate.deferred.tape import TensorRef
from nucleate.materialize.device_parts import parts_on
from nucleate.materialize.parts import Part, merged
from nucleate.materialize.source import Pieces


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor."""
    return hasattr(tensor, "__create_chunk_list__")


def offsets_of(shard: Any) -> tuple[int, ...] | None:
    """Return where in the whole this rank's part of a DTensor begins, or None if the part is no box of the whole."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if hasattr(shard._local_tensor, "__create_chunk_list__") or any(map(_is_partial, shard.placements)):
        # It consists of several parts, or torch refuses it.
        chunks = shard.__create_chunk_list__()
        if len(chunks) > 1:
            return None
        offsets = tuple(chunks[0].offsets) if chunks else (0,) * shard.dim()
    else:
        # What `__create_chunk_list__` asks (torch/distributed/tensor/_api.py, 2.13), once it has imported
        # torch.distributed.checkpoint for a class.
        _, offsets = compute_local_shape_and_global_offset(shard.shape, shard.device_mesh, shard.placements)
    for axis, placement in enumerate(shard.placements):
        # `_StridedShard` (torch/distributed/tensor/placement_types.py, 2.13) is one if later axes split the same
        # dimension into as many parts; else it takes every so many-th piece.
        split_factor = getattr(placement, "split_factor", 1)
        later = [
            shard.device_mesh.size(other)
            for other in range(axis + 1, len(shard.placements))
            if split_factor > 1 and shard.placements[other].is_shard(placement.dim)
        ]
        if split_factor != math.prod(later):
            return None
    return tuple(offsets)


def _is_partial(placement: Any) -> bool:
    return bool(placement.is_partial())


def flat_start(shard: Any) -> int | None:
    """Return at which element of the whole this rank's part of a DTensor begins, or None if it is no one stretch."""
    offsets = offsets_of(shard)
    if offsets is None:
        return None
    whole, first, _ = merged(shard.shape, offsets, shard.to_local().shape)
    return first[0] if len(whole) == 1 else None


def cut(shard: Any, whole: Tensor) -> Tensor:
    """Return this rank's part of a whole value.

    Args:
        shard: A DTensor of the shape of the whole.
        whole: The value.
    """
    offsets = offsets_of(shard)
    if offsets is None:
        from torch.distributed.tensor import distribute_tensor

        part: Any = distribute_tensor(whole, shard.device_mesh, shard.placements, src_data_rank=None)
        return part.to_local()  # type: ignore[no-any-return]
    for dim, (offset, length) in enumerate(zip(offsets, shard.to_local().shape, strict=True)):
        whole = whole.narrow(dim, offset if length else 0, length)
    return whole


@torch.no_grad()
def fill(shard: Any, whole: Tensor) -> None:
    """Copy this rank's part of a whole value into a DTensor's local tensor."""
    shard.to_local().copy_(cut(shard, whole))


def parts_of_shard(pieces: Pieces, ref: TensorRef, shard: Any) -> list[Part] | None:
    """Return what makes this rank's part straight into its place, or None where that cannot be.

    Args:
        pieces: Makes the storage of the whole.
        ref: The whole on that storage.
        shard: The DTensor.
    """
    local, offsets = shard.to_local().detach(), offsets_of(shard)
    same_dtype = local.dtype == pieces.dtype == ref.dtype
    if offsets is None or not same_dtype or not is_contiguous(ref):
        return None
    if not local.is_contiguous() and local.device.type == "cpu":
        return None
    return list(parts_on(pieces, ref.offset, ref.size, offsets, local))


def allocate_shards(model: nn.Module, device: torch.device, addresses: set[int]) -> list[torch.UntypedStorage]:
    """Give every DTensor on the meta device memory, with nothing in it.

    Args:
        model: The model.
        device: Where.
        addresses: Filled with the addresses of that memory.

    Returns:
        That memory.
    """
    storages: list[torch.UntypedStorage] = []

    def allocated(tensor: Any) -> Tensor:
        if not is_sharded(tensor) or not tensor.is_meta:
            return tensor  # type: ignore[no-any-return]
        new: Any = torch.empty_like(tensor, device=device)
        storages.append(new.to_local().untyped_storage())
        addresses.add(storages[-1].data_ptr())
        return new  # type: ignore[no-any-return]

    if any(is_sharded(parameter) and parameter.is_meta for parameter in model.parameters()):
        # Through `_apply`, so that FSDP takes notice of its new local tensors.
        model._apply(allocated)
    return storages


def take_back_shards(model: nn.Module, addresses: set[int]) -> None:
    """Put DTensors whose memory has one of these addresses back on the meta device."""

    def emptied(tensor: Any) -> Tensor:
        made_here = is_sharded(tensor) and not tensor.is_meta
        if not made_here or tensor.to_local().untyped_storage().data_ptr() not in addresses:
            return tensor  # type: ignore[no-any-return]
        return torch.empty_like(tensor, device="meta")

    if addresses:
        model._apply(emptied)


def zeros_beside(parameter: Tensor, shape: torch.Size, dtype: torch.dtype, dims: list[int]) -> Tensor:
    """Return zeros on the mesh of a sharded parameter, sharded as it is where both are sharded in that dim.

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
