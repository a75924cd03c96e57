"""Shards: every rank holds a part of each parameter and gathers one unit at a time (torch's FSDP2).

Parameters are sharded while they are still deferred; each rank then materializes its shards. Policies are passed as
keywords. Parameters that FSDP2 cannot shard are refused by name before any change. Parameters without a dimension, such
as a temperature, are allowed: every rank keeps them, and this strategy averages their gradients.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from nucleate.devices import hooks_of
from nucleate.errors import ConfigurationError
from nucleate.strategies.base import Strategy
from nucleate.strategies.sharded_class import make_shardable
from nucleate.strategies.sharded_step import sharded_step
from nucleate.strategies.unshardable import refuse_unshardable
from nucleate.strategies.unsteppable import refuse_unsteppable
from nucleate.strategies.wrap_policy import WrapPolicy, find_units

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.optim import Optimizer

    from nucleate.plugin import Composition


class FSDPStrategy(Strategy):
    """A strategy that shards parameters, gradients and optimizer state by `torch.distributed.fsdp.fully_shard`.

    Args:
        wrap: The modules that become units: `"auto"` finds repeated blocks; or classes of modules; or a function of
            a module's name and the module. Tied parameters always stay in one unit.
        mixed_precision: FSDP's own policy for compute and reduce dtypes. It is independent of
            `Runtime(precision=...)`, whose `*-mixed` use autocast under every strategy. `output_dtype` applies only to
            the root.
        cpu_offload: Keep shards in host memory while they are not used.
        reshard_after_forward: Free gathered parameters after forward (saves memory) or keep them for backward (saves
            communication). None lets FSDP choose; an integer reshards to a smaller group.
        num_replicas: HSDP: keep this many replicas, each sharded over `world_size / num_replicas` ranks.
        timeout: The time that a collective waits for the other ranks before it fails.
    """

    name = "fsdp"
    distributed = True
    shards = True

    def __init__(
        self,
        *,
        wrap: WrapPolicy = "auto",
        mixed_precision: MixedPrecisionPolicy | None = None,
        cpu_offload: bool = False,
        reshard_after_forward: bool | int | None = None,
        num_replicas: int = 1,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        if isinstance(wrap, str) and wrap != "auto":
            raise ConfigurationError(f"wrap={wrap!r} is not a policy. Give 'auto', classes of modules, or a function.")
        if isinstance(num_replicas, bool) or not isinstance(num_replicas, int) or num_replicas < 1:
            raise ConfigurationError(f"num_replicas={num_replicas!r} must be an integer of at least 1.")
        self.wrap = wrap
        self.mixed_precision = mixed_precision
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward
        self.num_replicas = num_replicas
        self.timeout = timeout
        self._mesh: DeviceMesh | None = None
        # Models whose gradients are accumulated without exchange.
        self._accumulating: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        # Parameters that every rank keeps whole and whose gradients are averaged.
        self._averaged = WeakIdKeyDictionary()

    def check(self, composition: Composition) -> None:
        """Refuse a number of replicas that does not divide the number of processes.

        Raises:
            ConfigurationError: `num_replicas` does not divide the number of processes.
        """
        world_size = composition.environment.world_size
        if world_size % self.num_replicas:
            raise ConfigurationError(
                f"num_replicas={self.num_replicas} does not divide the {world_size} processes. Choose a divisor of "
                f"{world_size}, or start another number of processes."
            )

    @property
    def mesh(self) -> DeviceMesh:
        """The device mesh, with the axis `dp_shard`; with replicas, the axis `dp_replicate` comes first."""
        if self._mesh is None:
            from torch.distributed.device_mesh import init_device_mesh

            world_size = self.environment.world_size
            if self.num_replicas == 1:
                shape, names = (world_size,), ("dp_shard",)
            else:
                shape, names = (self.num_replicas, world_size // self.num_replicas), ("dp_replicate", "dp_shard")  # type: ignore[assignment]
            self._mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        return self._mesh

    def module_init_context(self) -> AbstractContextManager[object]:
        """Return a context without effect: construction is already cheap because it is deferred."""
        return nullcontext()

    @property
    def storage_device(self) -> torch.device:
        """The device that keeps the shards: the host with `cpu_offload`."""
        return torch.device("cpu") if self.cpu_offload else self.device

    def check_model(self, model: nn.Module) -> None:
        """Refuse parameters that FSDP2 cannot shard.

        Raises:
            ConfigurationError: A parameter cannot be sharded. Nothing has been changed.
        """
        refuse_unshardable(model, find_units(model, self.wrap))

    def lay_out(self, model: nn.Module) -> None:
        """Shard the parameters of each unit and of the root. Parameters without a dimension stay whole."""
        from torch.distributed.fsdp import fully_shard

        units = find_units(model, self.wrap)
        scalars = {parameter for parameter in model.parameters() if parameter.dim() == 0}
        for module in (*(unit for _, unit in units), model):
            make_shardable(module)
        for _, unit in units:
            fully_shard(unit, **self._arguments(root=False), ignored_params=scalars)
        fully_shard(model, **self._arguments(root=True), ignored_params=scalars)

    def enclose(self, model: nn.Module) -> nn.Module:
        """Average the gradients of the parameters that every rank keeps whole, as FSDP averages those of shards."""
        for parameter in model.parameters():
            if parameter.dim() == 0:
                self._average_gradient(parameter, weakref.ref(model))
        return model

    def regain_shards(self, module: nn.Module) -> None:
        """Free the gathered parameters of all units, so that modules hold their shards."""
        from torch.distributed.fsdp import FSDPModule

        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def renew(self, model: nn.Module, module: nn.Module) -> nn.Module:
        """Average the gradients of whole parameters that require gradients only now."""
        return self.enclose(model)

    @contextmanager
    def no_backward_sync(self, module: nn.Module) -> Iterator[None]:
        """Accumulate gradients; meanwhile every rank keeps them whole."""
        module.set_requires_gradient_sync(False)  # type: ignore[operator]
        self._accumulating.add(module)
        try:
            yield
        finally:
            self._accumulating.discard(module)
            module.set_requires_gradient_sync(True)  # type: ignore[operator]

    def mark_forward_method(self, module: nn.Module, name: str) -> None:
        """Gather the root's parameters around the method too."""
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(module, name)

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that cannot step shards.

        Raises:
            ConfigurationError: The optimizer cannot step shards. Nothing has been changed.
        """
        refuse_unsteppable(optimizer)

    def optimizer_step_context(self, optimizer: Optimizer) -> AbstractContextManager[object]:
        """Return the context in which an optimizer steps shards."""
        return sharded_step(optimizer)

    def _average_gradient(self, parameter: nn.Parameter, model: weakref.ref[nn.Module]) -> None:
        """Average the gradient of a parameter that every rank keeps whole, as FSDP averages gradients of shards."""
        import torch.distributed as dist

        def average(parameter: torch.Tensor) -> None:
            # A gradient from an earlier exchange is equal on all ranks, so the average of the sum is right too.
            if model() not in self._accumulating and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(self.environment.world_size)

        if parameter.requires_grad and parameter not in self._averaged:
            self._averaged[parameter] = True
            handle = parameter.register_post_accumulate_grad_hook(average)
            hooks = parameter._post_accumulate_grad_hooks
            # Before the user's own hooks, which must see the same gradient as the optimizer.
            hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]

    def _arguments(self, root: bool) -> dict[str, Any]:
        from dataclasses import replace

        from torch.distributed.fsdp import CPUOffloadPolicy

        arguments: dict[str, Any] = {"mesh": self.mesh, "reshard_after_forward": self.reshard_after_forward}
        if self.mixed_precision is not None:
            # On a block, `output_dtype` would give the next block a dtype that it does not expect.
            policy = self.mixed_precision
            arguments["mp_policy"] = policy if root else replace(policy, output_dtype=None)
        if self.cpu_offload:
            arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=hooks_of(self.device).pins_memory)
        return arguments
