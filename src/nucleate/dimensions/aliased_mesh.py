"""A DeviceMesh whose axes have two names each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch.distributed.device_mesh import DeviceMesh


class AliasedMesh(DeviceMesh):
    """A mesh that also answers to other names of its axes. DTensors on it have the mesh's own names."""

    _aliases: Mapping[str, str]

    @classmethod
    def of(cls, mesh: DeviceMesh, aliases: Mapping[str, str]) -> Self:
        """Return a mesh with the same ranks and names.

        Args:
            mesh: The mesh.
            aliases: The name of an axis by its other name.
        """
        made = cls(mesh.device_type, mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
        made._aliases = dict(aliases)
        return made

    def __getitem__(self, names: Any) -> DeviceMesh:
        known = vars(self).get("_aliases", {})
        if isinstance(names, str):
            return super().__getitem__(known.get(names, names))
        return super().__getitem__(tuple(known.get(name, name) for name in names))

    def get_group(self, mesh_dim: Any = None) -> Any:
        """Return the process group of one axis, by its number or by one of its names."""
        return super().get_group(vars(self).get("_aliases", {}).get(mesh_dim, mesh_dim))

    def get_local_rank(self, mesh_dim: Any = None) -> int:
        """Return this rank's place on one axis, by the axis' number or by one of its names."""
        return super().get_local_rank(vars(self).get("_aliases", {}).get(mesh_dim, mesh_dim))
