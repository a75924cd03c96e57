"""Owners: the choice of one rank among the holders of the same part of a tensor, which acts for all of them."""

from __future__ import annotations

from typing import Any


class Dealer:
    """The choice of the owner, which writes a part that several ranks hold: the holder with the least to write so far.

    All holders of a part see the same tensors in the same order, so all choose the same owner.
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
