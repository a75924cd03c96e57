"""The mesh: the ranks of a run in a grid with named axes, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from nucleate.errors import ConfigurationError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: The names of axes, from the outer to the inner ones.
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run in a grid. It needs no process group.

    Attributes:
        axes: The name of each axis, from the outer to the inner ones.
        sizes: The number of ranks along each axis.
        ranks: The ranks, row by row; None for all ranks from 0 on, in their order.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    ranks: tuple[int, ...] | None = None
    _device_meshes: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def over(cls, world_size: int, sizes: Mapping[str, int]) -> Self:
        """Return the mesh of all ranks of a run.

        Args:
            world_size: The number of ranks.
            sizes: The size of each axis by its name, from the outer to the inner ones. One may be -1: it gets the rest.

        Raises:
            ConfigurationError: The sizes do not give the number of ranks, or more than one of them is -1.
        """
        wrong = [f"{name}={size!r}" for name, size in sizes.items() if not isinstance(size, int) or size < 1]
        open_axes = [name for name, size in sizes.items() if size == -1]
        if len(wrong) > len(open_axes) or len(open_axes) > 1:
            raise ConfigurationError(
                f"the axes {', '.join(wrong)} of a mesh must be integers of at least 1; one of them may be -1, and "
                "then gets the rest of the ranks."
            )
        known = math.prod(size for size in sizes.values() if size != -1)
        whole = {name: world_size // known if size == -1 else size for name, size in sizes.items()}
        if math.prod(whole.values()) != world_size:
            shown = " x ".join(f"{name}={size}" for name, size in sizes.items())
            raise ConfigurationError(
                f"the mesh {shown} does not fit {world_size} ranks. Choose sizes whose product is {world_size}, or "
                "start another number of processes."
            )
        return cls(tuple(whole), tuple(whole.values()))

    @property
    def size(self) -> int:
        """The number of ranks."""
        return math.prod(self.sizes)

    def coordinate(self, rank: int) -> tuple[int, ...] | None:
        """Return the place of a rank on each axis, or None if the mesh does not have the rank."""
        if self.ranks is not None:
            if rank not in self.ranks:
                return None
            rank = self.ranks.index(rank)
        elif not 0 <= rank < self.size:
            return None
        found = []
        for size in reversed(self.sizes):
            rank, place = divmod(rank, size)
            found.append(place)
        return tuple(reversed(found))

    def rank_at(self, coordinate: tuple[int, ...]) -> int:
        """Return the rank at a place."""
        number = 0
        for place, size in zip(coordinate, self.sizes, strict=True):
            number = number * size + place
        return number if self.ranks is None else self.ranks[number]

    def device_mesh(self, device_type: str) -> DeviceMesh:
        """Return torch's mesh of the same shape and names, which is made once. The process group must run.

        Args:
            device_type: The kind of device that the ranks use.
        """
        if device_type not in self._device_meshes:
            from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

            if self.ranks is None:
                made = init_device_mesh(device_type, self.sizes, mesh_dim_names=self.axes)
            else:
                import torch

                grid = torch.tensor(self.ranks).view(self.sizes)
                made = DeviceMesh(device_type, grid, mesh_dim_names=self.axes)
            self._device_meshes[device_type] = made
        return self._device_meshes[device_type]  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return " x ".join(f"{name}={size}" for name, size in zip(self.axes, self.sizes, strict=True)) or "one rank"
