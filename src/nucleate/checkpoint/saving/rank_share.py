"""What this rank holds of the tensors that are saved, and which part of it this rank is to write.

The boxes of all ranks together cover each tensor, none twice. Plain tensors are rank 0's: where replicas differ, such
as the running statistics of a batch norm, a checkpoint holds one model. Copies of a shard, which are equal by
contract, are dealt out over the ranks that have them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred import Given
from nucleate.errors import CheckpointError
from nucleate.layout import Dealer, is_sharded, offsets_of, scattered
from nucleate.materialize.memory import FreshMemory


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a tensor, with its values.

    Attributes:
        begin: Its first index in the tensor, for each dimension.
        values: A plain tensor, of any device and strides.
        given: Where the values are read from when it is their turn, cast to the dtype of `values`, which then is on the
            meta device; only of a box that is the whole tensor.
    """

    begin: tuple[int, ...]
    values: Tensor
    given: Given | None = None


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A tensor that is saved, as this rank sees it.

    Attributes:
        key: What it is called in the checkpoint.
        dtype: Of its elements.
        shape: Of the whole.
        sharded: The dims that are spread over ranks; None where it is a plain tensor.
        boxes: What this rank writes of it.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    sharded: tuple[int, ...] | None
    boxes: tuple[Box, ...]

    @property
    def size_bytes(self) -> int:
        """How large the whole is."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def held_bytes(self) -> int:
        """How much of it this rank writes."""
        return sum(box.values.numel() for box in self.boxes) * self.dtype.itemsize


def hold(tensors: Mapping[str, Tensor], rank: int) -> list[HeldTensor]:
    """Return the tensors as this rank sees them, in their order.

    Args:
        tensors: Key to tensor.
        rank: This process among all.

    Raises:
        CheckpointError: A tensor's bytes are not its values, or it is not reduced over the ranks yet.
    """
    dealer = Dealer(rank)
    return [_hold(key, tensor, dealer) for key, tensor in tensors.items()]


def frozen(tensors: list[HeldTensor]) -> list[HeldTensor]:
    """Return copies in CPU memory, of what this rank writes."""
    copies = [
        [torch.empty(box.values.shape, dtype=box.values.dtype, device="cpu") for box in held.boxes] for held in tensors
    ]
    memory = FreshMemory(copy.untyped_storage() for some in copies for copy in some)
    for some in copies:
        for copy in some:
            memory.touch(copy)
    return [
        HeldTensor(
            held.key,
            held.dtype,
            held.shape,
            held.sharded,
            tuple(Box(box.begin, copy.copy_(box.values)) for box, copy in zip(held.boxes, some, strict=True)),
        )
        for held, some in zip(tensors, copies, strict=True)
    ]


def _hold(key: str, tensor: Tensor, dealer: Dealer) -> HeldTensor:
    shape = tuple(tensor.shape)
    if not is_sharded(tensor):
        _refuse_opaque(key, tensor)
        boxes = (Box((0,) * len(shape), tensor.detach()),) if dealer.rank == 0 else ()
        return HeldTensor(key, tensor.dtype, shape, None, boxes)
    shard: Any = tensor
    if any(placement.is_partial() for placement in shard.placements):
        # It would be taken for the whole, though it is one rank's summand.
        raise CheckpointError(f"{key} is a DTensor that is not reduced yet. Save `tensor.full_tensor()`.")
    dims = tuple(sorted({placement.dim for placement in shard.placements if hasattr(placement, "dim")}))
    local = shard.to_local().detach()
    _refuse_opaque(key, local)
    if not dealer.takes(shard):
        return HeldTensor(key, tensor.dtype, shape, dims, ())
    if not math.prod(shape):
        # Nobody holds an element; one rank says that the tensor exists.
        first = all(
            place == 0 or placement.is_replicate()
            for place, placement in zip(shard.device_mesh.get_coordinate(), shard.placements, strict=True)
        )
        boxes = (Box((0,) * len(shape), local.new_empty(shape)),) if first else ()
        return HeldTensor(key, tensor.dtype, shape, dims, boxes)
    offsets = offsets_of(shard)
    whole = [(offsets, local)] if offsets is not None else scattered(shard, local)
    return HeldTensor(
        key, tensor.dtype, shape, dims, tuple(Box(tuple(begin), values) for begin, values in whole if values.numel())
    )


def _refuse_opaque(key: str, tensor: Tensor) -> None:
    if tensor.is_quantized or hasattr(tensor, "__tensor_flatten__"):
        raise CheckpointError(
            f"{key} is a {'quantized ' if tensor.is_quantized else ''}tensor of class {type(tensor).__name__}, which "
            "consists of several tensors. Save those, or `tensor.dequantize()`."
        )
