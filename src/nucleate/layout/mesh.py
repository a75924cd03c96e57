"""The mesh: the ranks of a run in a grid with named axes, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from nucleate.errors import ConfigurationError, name_list

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

#: The names of axes, from the outer to the inner ones. Other names are allowed: a dimension brings its own.
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
#: The axes whose ranks take different data.
DATA_AXES = ("dp_replicate", "dp_shard")


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run in a grid. It needs no process group.

    Attributes:
        axes: The name of each axis, from the outer to the inner ones.
        sizes: The number of ranks along each axis. One may be -1 until `fitted` gives it the rest of the ranks.
        ranks: The ranks, row by row; None for all ranks from 0 on, in their order.

    Examples:
        >>> mesh = Mesh.of({"dp_shard": -1, "tp": 2})
        >>> print(mesh.fitted(8))
        dp_shard=4 x tp=2
        >>> mesh.fitted(8).place(5, ("dp_shard",))
        (2, 4)
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    ranks: tuple[int, ...] | None = None
    _device_meshes: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def __reduce__(self) -> tuple[type[Mesh], tuple[Any, ...]]:
        # torch's meshes belong to the process that made them.
        return Mesh, (self.axes, self.sizes, self.ranks)

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> Self:
        """Return the mesh of all ranks of a run, whose number need not be known yet.

        Args:
            sizes: The size of each axis by its name, from the outer to the inner ones. One may be -1.

        Raises:
            ConfigurationError: A name is not a word, a size is not an integer of at least 1, more than one of them is
                -1, or there is no axis.
        """
        names = [name for name in sizes if not (isinstance(name, str) and name.isidentifier())]
        if names or not sizes:
            raise ConfigurationError(
                f"mesh={dict(sizes)!r} must have a name for each axis, such as {{'dp_shard': -1, 'tp': 2}}. nucleate's "
                f"own names are {name_list(AXES)}, from the outer to the inner axes."
            )
        wrong = [f"{name}={size!r}" for name, size in sizes.items() if not _is_size(size)]
        open_axes = [name for name, size in sizes.items() if size == -1]
        if len(wrong) > len(open_axes) or len(open_axes) > 1:
            raise ConfigurationError(
                f"the axes {', '.join(wrong)} of a mesh must be integers of at least 1; one of them may be -1, and "
                "then gets the rest of the ranks."
            )
        return cls(tuple(sizes), tuple(sizes.values()))

    @classmethod
    def over(cls, world_size: int, sizes: Mapping[str, int]) -> Self:
        """Return the mesh of a known number of ranks; see `of` and `fitted`."""
        return cls.of(sizes).fitted(world_size)

    def fitted(self, world_size: int) -> Self:
        """Return the mesh without -1.

        Args:
            world_size: The number of ranks.

        Raises:
            ConfigurationError: The sizes do not give the number of ranks.
        """
        known = math.prod(size for size in self.sizes if size != -1)
        whole = tuple(world_size // known if size == -1 else size for size in self.sizes)
        if math.prod(whole) != world_size or not all(whole):
            raise ConfigurationError(
                f"the mesh {self} does not fit {world_size} ranks. "
                + (
                    f"Choose sizes whose product divides {world_size}, or start a multiple of {known} processes."
                    if -1 in self.sizes
                    else f"Choose sizes whose product is {world_size}, or start {known} processes."
                )
            )
        return type(self)(self.axes, whole, self.ranks)

    def size_of(self, axis: str) -> int:
        """Return the size of an axis; 1 if the mesh does not have it."""
        return self.sizes[self.axes.index(axis)] if axis in self.axes else 1

    def place(self, rank: int, axes: Sequence[str]) -> tuple[int, int]:
        """Return the place of a rank along some axes taken together, and the number of places.

        Args:
            rank: The rank, one of the mesh.
            axes: Names of axes, from the outer to the inner ones. Axes that the mesh does not have are left out.
        """
        coordinate = self.coordinate(rank)
        assert coordinate is not None, f"rank {rank} is not in the mesh {self}"
        number, count = 0, 1
        for axis, size, place in zip(self.axes, self.sizes, coordinate, strict=True):
            if axis in axes:
                number, count = number * size + place, count * size
        return number, count

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

    def group(self, device_type: str, axes: Sequence[str]) -> ProcessGroup:
        """Return the process group of this rank along some axes taken together, which is made once.

        Every rank must ask for the same groups in the same order. The process group of all ranks must run.

        Args:
            device_type: The kind of device that the ranks use.
            axes: Names of axes. Axes that the mesh does not have are left out.
        """
        key = (device_type, tuple(axis for axis in self.axes if axis in axes))
        if key not in self._device_meshes:
            import torch.distributed as dist

            if not key[1]:
                made = dist.new_group([dist.get_rank()], use_local_synchronization=True)
            elif key[1] == self.axes and self.ranks is None:
                made = dist.group.WORLD
            else:
                part = self.device_mesh(device_type)[key[1]]
                made = (part if len(key[1]) == 1 else part._flatten("_".join(key[1]))).get_group()
            self._device_meshes[key] = made
        return self._device_meshes[key]  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return " x ".join(f"{name}={size}" for name, size in zip(self.axes, self.sizes, strict=True)) or "one rank"


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
