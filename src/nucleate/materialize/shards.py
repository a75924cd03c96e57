"""Shards: the memory of the part of a DTensor that this rank holds, and its filling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nucleate.deferred import Pieces
from nucleate.deferred.randomness import is_contiguous
from nucleate.deferred.tape import TensorRef
from nucleate.layout import cut, is_sharded, offsets_of
from nucleate.materialize.device_parts import parts_on
from nucleate.materialize.parts import Part


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
