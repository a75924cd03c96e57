"""The layout that dimensions will make, by arithmetic: for any number of ranks, in one process, from a meta model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from nucleate.dimensions.base import Dimension
from nucleate.layout import Layout, Mesh, Placement, Replicate, Shard, TensorLayout, layout_of
from nucleate.shells import named_buffers, named_parameters


def planned_layout(model: nn.Module, dimensions: Sequence[Dimension], mesh: Mesh) -> Layout | None:
    """Return the layout of a model that no dimension has changed yet.

    Args:
        model: The model. Its tensors may be on the meta device, or deferred.
        dimensions: The dimensions, in the order in which they are applied.
        mesh: The mesh; its sizes are known.

    Returns:
        The layout, or None if a function of the user decides.
    """
    announced: list[Mapping[str, Mapping[str, Placement]]] = []
    for dimension in dimensions:
        placements = dimension.placements(model, mesh)
        if placements is None:
            return None
        announced.append(placements)
    names: dict[int, list[str]] = {}
    tensors: dict[str, Tensor] = dict(named_parameters(model, remove_duplicate=False))
    buffers = dict(named_buffers(model, remove_duplicate=False))
    for fqn, tensor in (*tensors.items(), *buffers.items()):
        names.setdefault(id(tensor), []).append(fqn)
    found = {}
    for fqn, tensor in (*tensors.items(), *buffers.items()):
        tied = names[id(tensor)]
        splits = [each[name] for each in announced for name in tied if name in each]
        found[fqn] = replace(
            _laid_out(tensor, splits, mesh),
            is_buffer=fqn in buffers,
            tied_with=tuple(name for name in tied if name != fqn),
        )
    return Layout(found, mesh.size)


def _laid_out(tensor: Tensor, splits: Sequence[Mapping[str, Placement]], mesh: Mesh) -> TensorLayout:
    """Return the layout of one tensor.

    Args:
        tensor: The tensor.
        splits: What each dimension does to it, in the order in which they are applied.
        mesh: The mesh.
    """
    plain = layout_of(tensor, mesh.size)
    if not splits:
        return plain
    placements: dict[str, Placement] = {}
    for split in splits:
        for axis, placement in split.items():
            if axis in mesh.axes:
                placements[axis] = _after(placement, axis, placements, mesh)
    whole = tuple(placements.get(axis, Replicate()) for axis in mesh.axes)
    return replace(plain, mesh=mesh, placements=whole, is_plain=False)


def _after(placement: Placement, axis: str, placed: Mapping[str, Placement], mesh: Mesh) -> Placement:
    """Return a placement as torch notes it, where inner axes have split the same dim already."""
    if not isinstance(placement, Shard):
        return placement
    inner = mesh.axes[mesh.axes.index(axis) + 1 :]
    parts = math.prod(
        mesh.size_of(other)
        for other, split in placed.items()
        if other in inner and isinstance(split, Shard) and split.dim == placement.dim
    )
    return replace(placement, split_factor=placement.split_factor * parts)
