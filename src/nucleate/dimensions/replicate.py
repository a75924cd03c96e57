"""Replicas: every rank of an axis holds the same parameters, and the gradients are averaged over the axis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nucleate.dimensions.averaging import Averaging, broadcast_buffers
from nucleate.dimensions.base import Dimension, Placements
from nucleate.dimensions.module_policy import ModulePolicy, check_policy
from nucleate.dimensions.parts import has_forward, parts_of
from nucleate.dimensions.sharding.units import Units
from nucleate.dimensions.sharding.unshardable import refuse_unshardable
from nucleate.dimensions.sharding.wrap_policy import find_units, whole_parameters
from nucleate.errors import ConfigurationError, name_list
from nucleate.layout import Mesh, is_sharded
from nucleate.shells import named_parameters, plain_name

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Replicate(Dimension):
    """Replicas along `dp_replicate`.

    Where the mesh has no other axis of several ranks, `torch.nn.parallel.DistributedDataParallel` exchanges the
    gradients. Beside other axes, `replicate` of torch.distributed does it, because DDP does not know DTensors.

    Args:
        find_unused_parameters: Search for parameters that a backward will not reach, after each forward. DDP only.
        static_graph: Promise that every iteration uses the same parameters. DDP only.
        gradient_as_bucket_view: Keep gradients in the buckets that are exchanged, which saves one copy of them. DDP
            only.
        bucket_cap_mb: The size of a bucket in MiB; torch chooses by default. DDP only.
        sync_buffers: Broadcast rank 0's buffers before each forward that trains. A forward without gradients in
            evaluation mode uses the buffers of its rank. DDP only.
        wrap: The modules whose gradients are exchanged together, as for `FullyShard`. Beside other axes only.

    Raises:
        ConfigurationError: A value is not valid.
    """

    name = "replicate"
    axes = ("dp_replicate",)
    after = ("tensor_parallel", "activation_checkpointing", "compile")
    exchanges_gradients = True

    def __init__(
        self,
        *,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = True,
        bucket_cap_mb: float | None = None,
        sync_buffers: bool = True,
        wrap: ModulePolicy = "auto",
    ) -> None:
        check_policy(wrap, "wrap")
        self.find_unused_parameters = find_unused_parameters
        self.static_graph = static_graph
        self.gradient_as_bucket_view = gradient_as_bucket_view
        self.bucket_cap_mb = bucket_cap_mb
        self.sync_buffers = sync_buffers
        self.wrap = wrap
        self._averaging = Averaging()
        self._units = Units(wrap, self._make_unit, replicates=True)
        self._device_mesh: DeviceMesh | None = None

    def __getstate__(self) -> dict[str, Any]:
        # torch's mesh belongs to this process.
        return {**vars(self), "_device_mesh": None}

    def connect(self, device: Any, mesh: Mesh) -> None:
        """Store the device and the mesh. Beside other axes, parameters become DTensors."""
        super().connect(device, mesh)
        self.lays_out = not self._is_alone(mesh)

    def acts(self, mesh: Mesh) -> bool:
        """Return True: DDP also prepares the backward of one rank."""
        return True

    def check_model(self, model: nn.Module, mesh: Mesh) -> None:
        """Refuse a model that has a `DistributedDataParallel` inside, and beside other axes those of `FullyShard`.

        Raises:
            ConfigurationError: A part of the model is a `DistributedDataParallel` already, or `replicate` cannot take
                a parameter.
        """
        nested = [
            plain_name(model, name) or "the root"
            for name, module in model.named_modules()
            if isinstance(module, DistributedDataParallel)
        ]
        if nested:
            raise ConfigurationError(
                f"{name_list(nested)} of this model is a DistributedDataParallel, and the strategy 'ddp' exchanges all "
                "gradients itself. Two exchanges make wrong gradients where gradients accumulate. Give `setup` a model "
                "that has the module inside (its attribute `module`) instead."
            )
        laid_out = [name for name, parameter in named_parameters(model) if is_sharded(parameter)]
        if laid_out:
            raise ConfigurationError(
                f"{name_list(laid_out)} are DTensors, which DDP does not know. Give `setup` the model as it was "
                "constructed, and nucleate.strategies.Parallel the dimensions Replicate() and TensorParallel(plan) "
                "instead."
            )
        if not self._is_alone(mesh):
            units = find_units(model, self.wrap)
            refuse_unshardable(model, units, whole_parameters(model, units))

    def placements(self, model: nn.Module, mesh: Mesh) -> Placements:
        """Return nothing: no axis splits a tensor."""
        return {}

    def apply(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Make units of `replicate`, where DDP cannot exchange the gradients."""
        if not self._is_alone(self.mesh):
            self._device_mesh = mesh["dp_replicate"]
            self._units.make(model)

    def enclose(self, model: nn.Module) -> nn.Module:
        """Wrap the model in DDP, or complete the units of `replicate`.

        A model without trained parameters stays unwrapped, because DDP refuses it. A model without a forward stays
        unwrapped too: DDP acts only around forward. The gradients of its parameters are averaged one by one.
        """
        if not self._is_alone(self.mesh):
            self._units.complete(model, self.mesh.group(self.device.type, self.axes), self.device)
            return model
        if not has_forward(model):
            self._averaging.add(model, model.parameters())
            for _, part in parts_of(model):
                if self.sync_buffers:
                    part.register_forward_pre_hook(broadcast_buffers)
            return model
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return model
        return DistributedDataParallel(
            model,
            device_ids=None if self.device.type == "cpu" else [self.device],
            init_sync=False,
            find_unused_parameters=self.find_unused_parameters,
            static_graph=self.static_graph,
            gradient_as_bucket_view=self.gradient_as_bucket_view,
            bucket_cap_mb=self.bucket_cap_mb,
            **self._buffer_arguments(),  # type: ignore[arg-type]
        )

    def renew(self, model: nn.Module, module: nn.Module) -> nn.Module:
        """Wrap the model anew: DDP exchanges the gradients of the parameters that it saw when it was made."""
        if not has_forward(model) or not self._is_alone(self.mesh):
            return module
        if isinstance(module, DistributedDataParallel):
            # The old exchange hooks onto the gradients until its last reference is gone.
            del module.logger, module.reducer
        return self.enclose(model)

    def exchanges(self, call: str, module: nn.Module | None = None) -> bool:
        """Return True for backward, and for a forward before which rank 0 sends its buffers."""
        if call == "backward" or self.lays_out:
            return True
        if call != "forward" or not isinstance(module, DistributedDataParallel):
            return False
        return bool(module.require_forward_param_sync and self.sync_buffers and module.modules_buffers)

    @contextmanager
    def evaluation_context(self, module: nn.Module) -> Iterator[None]:
        """Keep DDP from sending rank 0's buffers: a rank may evaluate alone."""
        if not isinstance(module, DistributedDataParallel):
            yield
            return
        before = module.require_forward_param_sync
        module.require_forward_param_sync = False
        try:
            yield
        finally:
            module.require_forward_param_sync = before

    def no_backward_sync(self, module: nn.Module) -> AbstractContextManager[object]:
        """Accumulate gradients locally."""
        if self.lays_out:
            return self._units.no_backward_sync(module)
        return module.no_sync() if isinstance(module, DistributedDataParallel) else self._averaging.paused(module)

    def guards_methods(self, module: nn.Module) -> bool:
        """Return True for a DDP module: its own forward prepares the exchange, so bypassing it loses gradients."""
        return isinstance(module, DistributedDataParallel)

    def _is_alone(self, mesh: Mesh) -> bool:
        return mesh.size == mesh.size_of("dp_replicate")

    def _make_unit(self, module: nn.Module, is_root: bool, whole: set[nn.Parameter]) -> None:
        from torch.distributed._composable.replicate_with_fsdp import replicate

        replicate(module, mesh=self._device_mesh, ignored_params=whole)

    def _buffer_arguments(self) -> dict[str, bool]:
        if self.sync_buffers:
            return {}
        # torch 2.13 renamed the argument and warns about the old name.
        renamed = "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters
        return {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
