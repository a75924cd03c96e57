"""Shards: every rank holds a part of each parameter and gathers one unit at a time (torch's FSDP2).

Models that FSDP2 cannot shard are refused by name before any change. Some parameters stay whole on every rank, such as
a temperature without a dimension; this dimension averages their gradients.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nucleate.devices import hooks_of
from nucleate.dimensions.base import Dimension, Placements
from nucleate.dimensions.module_policy import ModulePolicy, check_policy
from nucleate.dimensions.sharding.explanation import explain_forward
from nucleate.dimensions.sharding.units import Units
from nucleate.dimensions.sharding.unshardable import refuse_unshardable
from nucleate.dimensions.sharding.wrap_policy import find_units, whole_parameters
from nucleate.errors import ConfigurationError
from nucleate.layout import DATA_AXES, Mesh, Shard
from nucleate.shells import named_parameters

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy


class FullyShard(Dimension):
    """Shards of parameters, gradients and optimizer state over `dp_shard`, by `torch.distributed.fsdp.fully_shard`.

    With an axis `dp_replicate` in the mesh, each replica is sharded over its own ranks (HSDP).

    Args:
        wrap: The modules that become units: `"auto"` finds repeated blocks; or classes of modules; or a function of
            a module's name and the module; or a policy of torch.distributed.fsdp.wrap. Tied parameters always stay in
            one unit.
        mixed_precision: FSDP's own policy for compute and reduce dtypes. It is independent of
            `Runtime(precision=...)`, whose `*-mixed` use autocast under every strategy. `output_dtype` applies only to
            the root.
        cpu_offload: Keep shards in host memory while they are not used.
        reshard_after_forward: Free gathered parameters after forward (saves memory) or keep them for backward (saves
            communication, as ZeRO stage 2 does). None lets FSDP choose; an integer reshards to a smaller group.

    Raises:
        ConfigurationError: A value is not valid.
    """

    name = "fully_shard"
    axes = DATA_AXES
    after = ("tensor_parallel", "activation_checkpointing", "compile")
    lays_out = True
    exchanges_gradients = True

    def __init__(
        self,
        *,
        wrap: ModulePolicy = "auto",
        mixed_precision: MixedPrecisionPolicy | None = None,
        cpu_offload: bool = False,
        reshard_after_forward: bool | int | None = None,
    ) -> None:
        check_policy(wrap, "wrap")
        self.wrap = wrap
        self.mixed_precision = mixed_precision
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward
        self._units = Units(wrap, self._make_unit)
        self._device_mesh: DeviceMesh | None = None

    def __getstate__(self) -> dict[str, Any]:
        # torch's mesh belongs to this process.
        return {**vars(self), "_device_mesh": None}

    def connect(self, device: torch.device, mesh: Mesh) -> None:
        """Store the device and the mesh.

        Raises:
            ConfigurationError: `reshard_after_forward` does not divide the number of shards.
        """
        super().connect(device, mesh)
        self.check_shards(mesh.size_of("dp_shard"))

    def check_shards(self, num_shards: int) -> None:
        """Refuse a number in `reshard_after_forward` that does not fit the number of shards.

        Raises:
            ConfigurationError: It does not divide the number of shards.
        """
        size = self.reshard_after_forward
        if isinstance(size, int) and not isinstance(size, bool) and (size < 1 or num_shards % size):
            raise ConfigurationError(
                f"reshard_after_forward={size} does not divide the {num_shards} shards of a parameter. Choose a "
                f"divisor of {num_shards}, or True, False or None."
            )

    def acts(self, mesh: Mesh) -> bool:
        """Return True: on one rank too, units compute in the dtypes of `mixed_precision`."""
        return True

    @property
    def storage_device(self) -> torch.device | None:
        """The device that keeps the shards: the host with `cpu_offload`."""
        return torch.device("cpu") if self.cpu_offload else None

    def check_model(self, model: nn.Module, mesh: Mesh) -> None:
        """Refuse models that FSDP2 cannot shard.

        Raises:
            ConfigurationError: A parameter cannot be sharded. Nothing has been changed.
        """
        units = find_units(model, self.wrap)
        refuse_unshardable(model, units, whole_parameters(model, units))

    def placements(self, model: nn.Module, mesh: Mesh) -> Placements:
        """Return a split of dim 0 for each parameter that FSDP takes."""
        whole = whole_parameters(model, find_units(model, self.wrap))
        return {fqn: {"dp_shard": Shard(0)} for fqn, p in named_parameters(model) if p not in whole}

    def apply(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Shard the parameters of each unit and of the root, except those that stay whole."""
        self._device_mesh = self._part_of(mesh)
        self._units.make(model)

    def enclose(self, model: nn.Module) -> nn.Module:
        """Average the gradients of parameters that every rank keeps whole, and let units be copied."""
        self._units.complete(model, self.mesh.group(self.device.type, DATA_AXES), self.storage_device or self.device)
        return model

    def no_backward_sync(self, module: nn.Module) -> AbstractContextManager[object]:
        """Accumulate gradients; meanwhile every rank keeps them whole."""
        return self._units.no_backward_sync(module)

    def explain(self, error: Exception, module: nn.Module, method: str) -> Exception | None:
        """Say which sharded parameters a method has used outside of the forward that gathers them."""
        return explain_forward(error, module, method)

    def __repr__(self) -> str:
        options = [
            f"{name}={value!r}" for name in ("cpu_offload", "reshard_after_forward") if (value := vars(self)[name])
        ]
        return f"FullyShard({', '.join(options)})"

    def _part_of(self, mesh: DeviceMesh) -> DeviceMesh:
        """Return the part of torch's mesh over which parameters are sharded, with replicas if there are several."""
        names = mesh.mesh_dim_names or ()
        part = tuple(axis for axis in self.axes if axis == "dp_shard" or (axis in names and mesh[axis].size() > 1))
        return mesh if part == names else mesh[part]

    def _make_unit(self, module: nn.Module, is_root: bool, whole: set[nn.Parameter]) -> None:
        from dataclasses import replace

        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

        arguments: dict[str, Any] = {"mesh": self._device_mesh, "reshard_after_forward": self.reshard_after_forward}
        if self.mixed_precision is not None:
            # On a block, `output_dtype` would give the next block a dtype that it does not expect.
            policy = self.mixed_precision
            arguments["mp_policy"] = policy if is_root else replace(policy, output_dtype=None)
        if self.cpu_offload:
            arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=hooks_of(self.device).pins_memory)
        fully_shard(module, **arguments, ignored_params=whole)
