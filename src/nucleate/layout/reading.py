"""The reading of live tensors: the placements, the mesh and the local part of a DTensor, as plain data.

Only this file asks a DTensor for them. A method for torch.distributed.checkpoint identifies a DTensor. A test of the
class would import torch.distributed.tensor, also where nothing is distributed, and the import takes longer than
constructing most models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nucleate.errors import ConfigurationError
from nucleate.layout.boxes import Box, merged
from nucleate.layout.layout import TensorLayout
from nucleate.layout.mesh import Mesh
from nucleate.layout.placements import Partial, Placement, Replicate, Shard, boxes_at, local_shape_at, order_of

_PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor."""
    # First the classes of nearly all tensors: the second question takes longer.
    return type(tensor) not in _PLAIN and hasattr(tensor, "__create_chunk_list__")


def local_of(tensor: Any) -> Tensor:
    """Return the tensor that this rank holds, detached: the local part of a DTensor, or a plain tensor itself."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return local.detach()


def num_held(tensor: Any) -> int:
    """Return the number of elements that this rank holds of a tensor."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return local.numel()


def whole_of(tensor: Any) -> Tensor:
    """Return the whole value of a tensor. Every rank of a DTensor's mesh must call it.

    The value has no graph where several axes split a fused dim.
    """
    if not is_sharded(tensor):
        return tensor  # type: ignore[no-any-return]
    orders = [order_of(dim, tensor.device_mesh.shape, placements_of(tensor)) for dim in range(tensor.dim())]
    if any(len(order) > 1 and any(parts > 1 for _, parts in order) for order in orders):
        return _joined(tensor)
    return tensor.full_tensor()  # type: ignore[no-any-return]


def _joined(tensor: Any) -> Tensor:
    """Return the whole value of a DTensor, put together from the boxes of all ranks.

    torch (2.13, torch/distributed/tensor/placement_types.py) puts the parts of `_StridedShard` into a wrong order if
    several axes split a dim, and one of them splits each of several parts.
    """
    from torch.distributed.tensor import Replicate as TorchReplicate

    if is_partial(tensor):
        reduced = [TorchReplicate() if each.is_partial() else each for each in tensor.placements]
        tensor = tensor.redistribute(placements=reduced)
    shape, sizes, placements = tuple(tensor.shape), tuple(tensor.device_mesh.shape), placements_of(tensor)
    splits = tuple(isinstance(placement, Shard) for placement in placements)
    places = list(itertools.product(*(range(size if split else 1) for size, split in zip(sizes, splits, strict=True))))
    shapes = [local_shape_at(shape, sizes, placements, place) for place in places]
    local = local_of(tensor).flatten()
    padded = local.new_zeros(max(map(math.prod, shapes)))
    padded[: len(local)] = local
    whole = local.new_empty(shape)
    for values, place, local_shape in zip(
        gathered_from(padded, tensor.device_mesh, splits), places, shapes, strict=True
    ):
        part = values[: math.prod(local_shape)].view(local_shape)
        for box in boxes_at(shape, sizes, placements, place):
            box.of_whole(whole).copy_(box.of_local(part))
    return whole


def placements_of(tensor: Any) -> tuple[Placement, ...]:
    """Return the placement of a DTensor on each axis of its mesh.

    Raises:
        ConfigurationError: A placement is of an unknown kind.
    """
    return tuple(map(_placement, tensor.placements))


def axes_of(tensor: Any) -> tuple[str, ...]:
    """Return the names of the axes of a DTensor's mesh; none for a plain tensor."""
    return tuple(tensor.device_mesh.mesh_dim_names or ()) if is_sharded(tensor) else ()


def is_partial(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor that is not reduced over its ranks yet."""
    return is_sharded(tensor) and any(placement.is_partial() for placement in tensor.placements)


def held_values(tensor: Any) -> Tensor:
    """Return the elements that this rank holds of a tensor, in their memory; those of a sparse tensor are listed."""
    local = tensor.to_local() if is_sharded(tensor) else tensor
    return local if local.layout == torch.strided else local.values()  # type: ignore[no-any-return]


def reduced_gradient(parameter: Any) -> Tensor:
    """Return the gradient of a parameter. A partial gradient is added up over the ranks, in a new tensor."""
    gradient = parameter.grad
    if not is_partial(gradient):
        return gradient  # type: ignore[no-any-return]
    from torch.distributed.tensor import Replicate as TorchReplicate

    # Where the parameter is sharded, its gradient becomes sharded as well.
    is_alike = is_sharded(parameter) and parameter.device_mesh == gradient.device_mesh
    own = parameter.placements if is_alike else [TorchReplicate()] * len(gradient.placements)
    wanted = [mine if theirs.is_partial() else theirs for theirs, mine in zip(gradient.placements, own, strict=True)]
    return gradient.redistribute(placements=wanted)  # type: ignore[no-any-return]


def spread_of(tensor: Any) -> tuple[Any, tuple[bool, ...]] | None:
    """Return where a tensor is sharded: its mesh, and for each axis whether the ranks hold different elements.

    Equal meshes give equal results, also if they are different objects. The result is None if each rank holds the whole
    tensor.
    """
    if not is_sharded(tensor):
        return None
    splits = tuple(not placement.is_replicate() for placement in tensor.placements)
    return (tensor.device_mesh, splits) if any(splits) else None


def gathered_from(values: Tensor, mesh: Any, splits: tuple[bool, ...]) -> Tensor:
    """Return the values `(n,)` of all ranks that hold different elements, as `(ranks, n)`, alike on every rank.

    Args:
        values: This rank's values.
        mesh: The mesh; see `spread_of`.
        splits: For each axis of the mesh, whether its ranks hold different elements.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Replicate as TorchReplicate
    from torch.distributed.tensor import Shard as TorchShard

    placements = [TorchShard(0) if is_split else TorchReplicate() for is_split in splits]
    return DTensor.from_local(values.unsqueeze(0), mesh, placements, run_check=False).full_tensor()


def boxes_of(tensor: Any) -> tuple[Box, ...]:
    """Return the boxes that this rank holds of a DTensor; one empty box if it holds no element."""
    if hasattr(tensor._local_tensor, "__create_chunk_list__"):
        # The local part consists of several tensors itself.
        chunks = tensor.__create_chunk_list__()
        return tuple(Box(tuple(chunk.offsets), tuple(chunk.sizes), (0,) * tensor.dim()) for chunk in chunks)
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return ()
    return boxes_at(tuple(tensor.shape), tuple(mesh.shape), placements_of(tensor), tuple(coordinate))


def offsets_of(tensor: Any) -> tuple[int, ...] | None:
    """Return the first index of this rank's part of a DTensor, or None if the part is not one box of the whole."""
    boxes = boxes_of(tensor)
    if len(boxes) > 1:
        return None
    return boxes[0].begin if boxes else tuple(0 for _ in tensor.shape)


def flat_start(tensor: Any) -> int | None:
    """Return the first element of this rank's part of a DTensor in the whole, or None if the part is not one range."""
    offsets = offsets_of(tensor)
    if offsets is None:
        return None
    whole, first, _ = merged(tensor.shape, offsets, tensor.to_local().shape)
    return first[0] if len(whole) == 1 else None


def cut(tensor: Any, whole: Tensor) -> Tensor:
    """Return this rank's part of a whole value.

    Args:
        tensor: A DTensor of the shape of the whole.
        whole: The whole value.
    """
    boxes = boxes_of(tensor)
    if len(boxes) == 1:
        return boxes[0].of_whole(whole)
    local = whole.new_empty(tensor.to_local().shape)
    for box in boxes:
        box.of_local(local).copy_(box.of_whole(whole))
    return local


def laid_out_like(parameter: Any, whole: Tensor) -> Tensor:
    """Return a whole value as a DTensor that is laid out as a parameter is, or the value itself beside a plain one.

    Nothing is exchanged: each rank keeps its part of its own copy.

    Args:
        parameter: A parameter of the value's shape.
        whole: The whole value.
    """
    if not is_sharded(parameter) or is_sharded(whole):
        return whole
    from torch.distributed.tensor import DTensor

    part = cut(parameter, whole).contiguous()
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def layout_of(tensor: Any, world_size: int) -> TensorLayout:
    """Return the layout of one live tensor, without its ties.

    Args:
        tensor: A parameter, a buffer or any other tensor.
        world_size: The number of ranks of the run.
    """
    shape, dtype, trains = tuple(tensor.shape), tensor.dtype, bool(tensor.requires_grad)
    if not is_sharded(tensor):
        mesh = Mesh(("world",), (world_size,)) if world_size > 1 else Mesh((), ())
        return TensorLayout(dtype, shape, mesh, (Replicate(),) * len(mesh.axes), trains)
    mesh = mesh_of(tensor.device_mesh)
    placements = placements_of(tensor)
    # The mesh of all groups has one more axis than that of one group.
    rest = (Replicate(),) * (len(mesh.axes) - len(placements))
    return TensorLayout(dtype, shape, mesh, (*rest, *placements), trains, is_plain=False)


@lru_cache(maxsize=16)
def mesh_of(device_mesh: Any) -> Mesh:
    """Return a DeviceMesh as plain data.

    A slice of a larger mesh, such as `mesh["tp"]`, has one group of ranks on each process. The result has all of them,
    along a first axis that is called `groups`.
    """
    names = tuple(device_mesh.mesh_dim_names or (f"axis{number}" for number in range(device_mesh.ndim)))
    # Private to torch (torch/distributed/device_mesh.py, 2.13), which has no other way to the groups of other ranks.
    groups = device_mesh._layout.remap_to_tensor(device_mesh._rank_map)
    ranks = tuple(groups.flatten().tolist())
    is_ordered = ranks == tuple(range(len(ranks)))
    if groups.shape[0] == 1:
        return Mesh(names, tuple(groups.shape[1:]), None if is_ordered else ranks)
    return Mesh(("groups", *names), tuple(groups.shape), None if is_ordered else ranks)


def zeros_beside(parameter: Tensor, shape: torch.Size, dtype: torch.dtype, dims: Sequence[int]) -> Tensor:
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
    wanted = [
        placement if isinstance(placement, (Shard, _StridedShard)) and placement.dim in dims else Replicate()
        for placement in parameter.placements
    ]
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank outside of the mesh has no state for the parameter"
    local = local_shape_at(tuple(shape), tuple(mesh.shape), tuple(map(_placement, wanted)), tuple(coordinate))
    zeros = torch.zeros(local, dtype=dtype, device=parameter.to_local().device)
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(zeros, mesh, wanted, run_check=False, shape=shape, stride=strides)


def _placement(placement: Any) -> Placement:
    if placement.is_replicate():
        return Replicate()
    if placement.is_partial():
        return Partial(str(placement.reduce_op))
    if not hasattr(placement, "dim"):
        raise ConfigurationError(f"{placement!r} is a placement of an unknown kind: a shard, a replica or a summand.")
    return Shard(placement.dim, int(getattr(placement, "split_factor", 1)))
