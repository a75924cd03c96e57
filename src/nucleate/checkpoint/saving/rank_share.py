"""This rank's share of the saved tensors: the boxes that it writes.

The boxes of all ranks together cover each element of each tensor once. Rank 0 writes plain tensors: where replicas
differ, as in the running statistics of a batch norm, a checkpoint then holds one rank's model. Copies of a shard are
equal by contract. Their holders share the writing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nucleate.deferred import ElementSource
from nucleate.errors import CheckpointError
from nucleate.layout import Dealer, Shard, boxes_of, is_partial, is_sharded, is_writer, layout_of, local_of
from nucleate.materialize.memory import FreshMemory


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a tensor, with its values.

    Attributes:
        begin: The box's first index in the tensor, for each dimension.
        values: A plain tensor, on any device and with any strides.
        given: The element source that the values are read from when the box is written, cast to the dtype of `values`.
            Then `values` is on the meta device and the box is the whole tensor.
    """

    begin: tuple[int, ...]
    values: Tensor
    given: ElementSource | None = None


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A saved tensor, with this rank's boxes.

    Attributes:
        key: The tensor's name in the checkpoint.
        dtype: The dtype of the elements.
        shape: The shape of the whole tensor.
        sharded: The dims that are spread over ranks; None for a plain tensor.
        boxes: The boxes that this rank writes.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    sharded: tuple[int, ...] | None
    boxes: tuple[Box, ...]

    @property
    def size_bytes(self) -> int:
        """The size of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def held_bytes(self) -> int:
        """The size of the boxes that this rank writes."""
        return sum(box.values.numel() for box in self.boxes) * self.dtype.itemsize


def hold(tensors: Mapping[str, Tensor], rank: int) -> list[SavedTensor]:
    """Return the tensors with this rank's boxes, in their order.

    Args:
        tensors: Key to tensor.
        rank: The number of this process.

    Raises:
        CheckpointError: A tensor consists of several tensors, or it is not reduced over the ranks yet.
    """
    dealer = Dealer()
    return [_hold(key, tensor, rank, dealer) for key, tensor in tensors.items()]


def frozen(tensors: list[SavedTensor]) -> list[SavedTensor]:
    """Return copies of the boxes that this rank writes, in CPU memory."""
    copies = [
        [torch.empty(box.values.shape, dtype=box.values.dtype, device="cpu") for box in held.boxes] for held in tensors
    ]
    memory = FreshMemory(copy.untyped_storage() for some in copies for copy in some)
    for some in copies:
        for copy in some:
            memory.touch(copy)
    return [
        SavedTensor(
            held.key,
            held.dtype,
            held.shape,
            held.sharded,
            tuple(Box(box.begin, copy.copy_(box.values)) for box, copy in zip(held.boxes, some, strict=True)),
        )
        for held, some in zip(tensors, copies, strict=True)
    ]


def _hold(key: str, tensor: Tensor, rank: int, dealer: Dealer) -> SavedTensor:
    shape = tuple(tensor.shape)
    if not is_sharded(tensor):
        _refuse_opaque(key, tensor)
        boxes = (Box((0,) * len(shape), tensor.detach()),) if rank == 0 else ()
        return SavedTensor(key, tensor.dtype, shape, None, boxes)
    if is_partial(tensor):
        # The file would show one rank's summand as the whole tensor.
        raise CheckpointError(f"{key} is a DTensor that is not reduced yet. Save `tensor.full_tensor()`.")
    local, layout = local_of(tensor), layout_of(tensor, world_size=1)
    _refuse_opaque(key, local)
    placements = layout.placements
    dims = tuple(sorted({placement.dim for placement in placements if isinstance(placement, Shard)}))
    writer = dealer.deal(layout.mesh, placements, layout.size_bytes)
    coordinate = layout.mesh.coordinate(rank)
    if coordinate is None or not is_writer(placements, writer, coordinate):
        return SavedTensor(key, tensor.dtype, shape, dims, ())
    if not math.prod(shape):
        # No rank holds an element. One rank writes that the tensor exists.
        first = coordinate == writer
        boxes = (Box((0,) * len(shape), local.new_empty(shape)),) if first else ()
        return SavedTensor(key, tensor.dtype, shape, dims, boxes)
    held = tuple(Box(box.begin, box.of_local(local)) for box in boxes_of(tensor) if box.numel)
    return SavedTensor(key, tensor.dtype, shape, dims, held)


def _refuse_opaque(key: str, tensor: Tensor) -> None:
    if tensor.is_quantized or hasattr(tensor, "__tensor_flatten__"):
        raise CheckpointError(
            f"{key} is a {'quantized ' if tensor.is_quantized else ''}tensor of class {type(tensor).__name__}, which "
            "consists of several tensors. Save those, or `tensor.dequantize()`."
        )
