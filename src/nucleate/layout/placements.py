"""Placements: the part of a tensor that a rank of a mesh holds, by arithmetic on plain numbers.

A tensor has one placement for each axis of its mesh, as a DTensor has. Where several axes split the same dim, their
order counts: each axis splits what the axes before it have left. torch notes the order in `_StridedShard`
(torch/distributed/tensor/placement_types.py, 2.13). `fully_shard` splits what tensor parallelism has left, although its
axis is the outer one: it notes the number of parts that exist already as the split factor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from nucleate.layout.boxes import Box

#: Consecutive indices of one dim: the first one and their number.
Span: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Replicate:
    """Each rank of the axis holds the same values."""

    def __str__(self) -> str:
        return "replicate"


@dataclass(frozen=True, slots=True)
class Shard:
    """The ranks of the axis split a dim into consecutive parts, as `torch.chunk` does; the last parts may be empty.

    Attributes:
        dim: The dim.
        split_factor: The number of parts that the dim was split into before, as in torch's `_StridedShard`. If no other
            axis makes these parts, each rank holds a slice of each of them, as of the parts of a fused weight.
    """

    dim: int
    split_factor: int = 1

    def __str__(self) -> str:
        return f"shard dim {self.dim}" + (f" of {self.split_factor} parts" if self.split_factor > 1 else "")


@dataclass(frozen=True, slots=True)
class Partial:
    """Each rank of the axis holds a summand; the value is their reduction.

    Attributes:
        op: The name of the reduction.
    """

    op: str = "sum"

    def __str__(self) -> str:
        return f"partial {self.op}"


Placement: TypeAlias = Replicate | Shard | Partial


@lru_cache(maxsize=4096)
def boxes_at(
    shape: tuple[int, ...], sizes: tuple[int, ...], placements: tuple[Placement, ...], coordinate: tuple[int, ...]
) -> tuple[Box, ...]:
    """Return the boxes that the rank at a coordinate of a mesh holds, in the order of their places in its memory.

    Args:
        shape: The shape of the whole tensor.
        sizes: The size of each axis of the mesh.
        placements: The placement on each axis.
        coordinate: The rank's coordinate on each axis.

    Returns:
        The boxes; one empty box if the rank holds no element.
    """
    spans = [spans_at(dim, length, sizes, placements, coordinate) for dim, length in enumerate(shape)]
    starts = [list(itertools.accumulate((length for _, length in found), initial=0)) for found in spans]
    return tuple(
        Box(
            tuple(found[number][0] for found, number in zip(spans, numbers, strict=True)),
            tuple(found[number][1] for found, number in zip(spans, numbers, strict=True)),
            tuple(start[number] for start, number in zip(starts, numbers, strict=True)),
        )
        for numbers in itertools.product(*(range(len(found)) for found in spans))
    )


def local_shape_at(
    shape: tuple[int, ...], sizes: tuple[int, ...], placements: tuple[Placement, ...], coordinate: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the shape of the tensor that the rank at a coordinate holds; see `boxes_at`."""
    return tuple(
        sum(number for _, number in spans_at(dim, length, sizes, placements, coordinate))
        for dim, length in enumerate(shape)
    )


def spans_at(
    dim: int, length: int, sizes: Sequence[int], placements: Sequence[Placement], coordinate: Sequence[int]
) -> list[Span]:
    """Return the indices of one dim that the rank at a coordinate holds, in their order in its memory.

    Args:
        dim: The dim.
        length: The dim's length in the whole tensor.
        sizes: The size of each axis of the mesh.
        placements: The placement on each axis.
        coordinate: The rank's coordinate on each axis.

    Returns:
        Spans that do not touch each other; one empty span if the rank holds no index.
    """
    spans = [(0, length)]
    for axis, parts in order_of(dim, sizes, placements):
        held = sum(number for _, number in spans)
        taken: list[Span] = []
        for part in range(parts):
            begin, end = _chunk(held, parts, part)
            first, last = _chunk(end - begin, sizes[axis], coordinate[axis])
            taken += _slice(spans, begin + first, begin + last)
        spans = _joined(taken)
    return spans


def order_of(dim: int, sizes: Sequence[int], placements: Sequence[Placement]) -> list[tuple[int, int]]:
    """Return the axes that split a dim, in the order in which they split it.

    Args:
        dim: The dim.
        sizes: The size of each axis of the mesh.
        placements: The placement on each axis.

    Returns:
        For each axis its number, and the number of equal parts that it splits one by one: 1, except for parts that no
        axis makes.
    """
    order: list[tuple[int, int]] = []
    for axis in reversed(range(len(placements))):
        placement = placements[axis]
        if not isinstance(placement, Shard) or placement.dim != dim:
            continue
        # An axis with a split factor comes after the axes that make as many parts.
        made = [math.prod(sizes[other] for other, _ in order[:place]) for place in range(1, len(order) + 1)]
        if placement.split_factor == 1:
            order.insert(0, (axis, 1))
        elif placement.split_factor in made:
            order.insert(made.index(placement.split_factor) + 1, (axis, 1))
        else:
            order.insert(0, (axis, placement.split_factor))
    return order


def _chunk(length: int, parts: int, number: int) -> tuple[int, int]:
    """Return the first index of a part of `torch.chunk`, and the index behind its last one."""
    size = -(-length // parts)
    return min(length, number * size), min(length, (number + 1) * size)


def _slice(spans: Sequence[Span], begin: int, end: int) -> list[Span]:
    """Return the indices from position `begin` to position `end` of a list of spans."""
    taken, position = [], 0
    for first, number in spans:
        low, high = max(begin, position), min(end, position + number)
        if low < high:
            taken.append((first + low - position, high - low))
        position += number
    return taken


def _joined(spans: Sequence[Span]) -> list[Span]:
    joined: list[Span] = []
    for first, number in spans:
        if joined and first == sum(joined[-1]):
            joined[-1] = (joined[-1][0], joined[-1][1] + number)
        else:
            joined.append((first, number))
    return joined or [(0, 0)]
