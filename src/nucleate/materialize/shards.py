"""Shards: functions that allocate, fill and free the part of a DTensor that this rank holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nucleate.deferred import RangeMaker
from nucleate.deferred.randomness import is_contiguous
from nucleate.deferred.tape import TensorRef
from nucleate.layout import boxes_of, cut, is_sharded, local_of
from nucleate.materialize.device_parts import parts_on
from nucleate.materialize.parts import Part


@torch.no_grad()
def fill(shard: Any, whole: Tensor) -> None:
    """Copy this rank's part of a whole value into a DTensor's local tensor."""
    local_of(shard).copy_(cut(shard, whole))


def parts_of_shard(maker: RangeMaker, ref: TensorRef, shard: Any) -> list[Part] | None:
    """Return parts that make this rank's shard directly in its place, or None if that is not possible.

    Args:
        maker: The range maker of the storage of the whole tensor.
        ref: The whole tensor on this storage.
        shard: The DTensor.
    """
    local = local_of(shard)
    if not local.dtype == maker.dtype == ref.dtype or not is_contiguous(ref):
        return None
    places = [(box.begin, box.of_local(local)) for box in boxes_of(shard)]
    if local.device.type == "cpu" and not all(place.is_contiguous() for _, place in places):
        return None
    return [part for begin, place in places for part in parts_on(maker, ref.offset, ref.size, begin, place)]


def allocate_shards(model: nn.Module, device: torch.device, addresses: set[int]) -> list[torch.UntypedStorage]:
    """Allocate memory for every DTensor on the meta device, without a value.

    Args:
        model: The model.
        device: The device of the memory.
        addresses: The addresses of the new memory are added to this set.

    Returns:
        The storages of the new memory.
    """
    storages: list[torch.UntypedStorage] = []

    def allocated(tensor: Any) -> Tensor:
        if not is_sharded(tensor) or not tensor.is_meta:
            return tensor  # type: ignore[no-any-return]
        new: Any = torch.empty_like(tensor, device=device)
        storages.append(local_of(new).untyped_storage())
        addresses.add(storages[-1].data_ptr())
        return new  # type: ignore[no-any-return]

    if any(is_sharded(parameter) and parameter.is_meta for parameter in model.parameters()):
        # Through `_apply`, so that FSDP notices its new local tensors.
        model._apply(allocated)
    return storages


def take_back_shards(model: nn.Module, addresses: set[int]) -> None:
    """Put DTensors whose memory has one of these addresses back on the meta device."""

    def emptied(tensor: Any) -> Tensor:
        made_here = is_sharded(tensor) and not tensor.is_meta
        if not made_here or local_of(tensor).untyped_storage().data_ptr() not in addresses:
            return tensor  # type: ignore[no-any-return]
        return torch.empty_like(tensor, device="meta")

    if addresses:
        model._apply(emptied)
