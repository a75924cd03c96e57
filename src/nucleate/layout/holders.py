"""Holders and writers: the ranks that hold the same part of a tensor, and the one of them that writes it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from nucleate.layout.mesh import Mesh
from nucleate.layout.placements import Placement, Shard


def holders_of(mesh: Mesh, placements: Sequence[Placement], coordinate: Sequence[int]) -> tuple[int, ...]:
    """Return the ranks that hold the same part of a tensor as the rank at a coordinate, in ascending order.

    Args:
        mesh: The mesh.
        placements: The tensor's placement on each axis of the mesh.
        coordinate: A place in the mesh.
    """
    free = [
        (place,) if isinstance(placement, Shard) else range(size)
        for place, placement, size in zip(coordinate, placements, mesh.sizes, strict=True)
    ]
    return tuple(sorted(mesh.rank_at(other) for other in itertools.product(*free)))


def parts_of(mesh: Mesh, placements: Sequence[Placement]) -> Iterator[tuple[int, ...]]:
    """Yield one coordinate for each part that some rank holds: the first one in the mesh."""
    yield from itertools.product(
        *(
            range(size if isinstance(placement, Shard) else 1)
            for placement, size in zip(placements, mesh.sizes, strict=True)
        )
    )


class Dealer:
    """The choice of the rank that writes a part that several ranks hold: the holder with the least to write so far.

    The choice is arithmetic. It is the same on every rank that asks for the same tensors in the same order. All parts
    of one tensor go to ranks at the same place among their holders, because the parts have nearly the same size.
    """

    def __init__(self) -> None:
        self._loads: dict[tuple[Mesh, tuple[int, ...]], list[int]] = {}

    def deal(self, mesh: Mesh, placements: Sequence[Placement], size_bytes: int) -> tuple[int, ...]:
        """Choose the writers of one tensor.

        Args:
            mesh: The tensor's mesh.
            placements: The tensor's placement on each axis of the mesh.
            size_bytes: The size of the whole tensor in bytes.

        Returns:
            The writers' place on each axis; 0 on the axes that split the tensor. `is_writer` reads it.
        """
        axes = tuple(axis for axis, placement in enumerate(placements) if not isinstance(placement, Shard))
        sizes = [mesh.sizes[axis] for axis in axes]
        copies = list(itertools.product(*map(range, sizes)))
        loads = self._loads.setdefault((mesh, axes), [0] * len(copies))
        lightest = loads.index(min(loads))
        loads[lightest] += size_bytes
        chosen = [0] * len(placements)
        for axis, place in zip(axes, copies[lightest], strict=True):
            chosen[axis] = place
        return tuple(chosen)


def is_writer(placements: Sequence[Placement], writer: Sequence[int], coordinate: Sequence[int]) -> bool:
    """Return whether the rank at a coordinate writes its part of a tensor.

    Args:
        placements: The tensor's placement on each axis of the mesh.
        writer: The result of `Dealer.deal`.
        coordinate: The rank's place on each axis.
    """
    return all(
        isinstance(placement, Shard) or place == chosen
        for placement, chosen, place in zip(placements, writer, coordinate, strict=True)
    )
