"""Holders: which of the ranks that hold the same part of a tensor acts for all of them."""

from __future__ import annotations

from typing import Any


class Dealer:
    """Decides which of the ranks that hold the same part writes it: the one that has least to write so far.

    Every rank of such a group sees the same tensors in the same order, so all come to the same answer.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._loads: dict[tuple[int, ...], list[int]] = {}

    def takes(self, shard: Any) -> bool:
        """Return whether this rank writes its part of a DTensor."""
        coordinate = shard.device_mesh.get_coordinate()
        if coordinate is None:
            return False
        index = tuple(
            slice(None) if placement.is_replicate() else place
            for place, placement in zip(coordinate, shard.placements, strict=True)
        )
        members = tuple(shard.device_mesh.mesh[index].flatten().tolist())
        loads = self._loads.setdefault(members, [0] * len(members))
        lightest = loads.index(min(loads))
        loads[lightest] += shard.to_local().numel() * shard.dtype.itemsize
        taken: bool = members[lightest] == self.rank
        return taken
