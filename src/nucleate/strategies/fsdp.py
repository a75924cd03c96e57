"""Shards: every rank holds a part of each parameter and gathers one unit at a time (torch's FSDP2).

Parameters are sharded while they are still deferred; each rank then materializes its shards. Policies are passed as
keywords. Models that FSDP2 cannot shard are refused by name before any change. Some parameters stay whole on every
rank, such as a temperature without a dimension; this strategy averages their gradients.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import nn

from nucleate.devices import hooks_of
from nucleate.errors import ConfigurationError
from nucleate.layout import is_sharded
from nucleate.strategies.averaging import Averaging
from nucleate.strategies.base import Strategy
from nucleate.strategies.explanation import explain_forward
from nucleate.strategies.fabric_names import (
    Sharding,
    checked_mixed_precision,
    checked_state_dict_type,
    joined_policy,
    offloads,
    refuse_for_fsdp,
)
from nucleate.strategies.gathering import gatherings_in
from nucleate.strategies.group_options import checked_backend, checked_timeout
from nucleate.strategies.module_policy import ModulePolicy, check_policy
from nucleate.strategies.parts import parts_of
from nucleate.strategies.sharded_class import make_root, make_shardable
from nucleate.strategies.sharded_copy import ShardedCopy
from nucleate.strategies.sharded_step import sharded_step
from nucleate.strategies.start_method import checked_start_method
from nucleate.strategies.unshardable import refuse_unshardable
from nucleate.strategies.unsteppable import refuse_unsteppable
from nucleate.strategies.wrap_policy import find_units, size_of, whole_parameters

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import CPUOffload, MixedPrecisionPolicy, ShardingStrategy
    from torch.optim import Optimizer

    from nucleate.plugin import Composition


class FSDPStrategy(Strategy):
    """A strategy that shards parameters, gradients and optimizer state by `torch.distributed.fsdp.fully_shard`.

    Args:
        wrap: The modules that become units: `"auto"` finds repeated blocks; or classes of modules; or a function of
            a module's name and the module; or a policy of torch.distributed.fsdp.wrap. Tied parameters always stay in
            one unit.
        mixed_precision: FSDP's own policy for compute and reduce dtypes. It is independent of
            `Runtime(precision=...)`, whose `*-mixed` use autocast under every strategy. `output_dtype` applies only to
            the root.
        cpu_offload: Keep shards in host memory while they are not used.
        reshard_after_forward: Free gathered parameters after forward (saves memory) or keep them for backward (saves
            communication). None lets FSDP choose; an integer reshards to a smaller group.
        num_replicas: HSDP: keep this many replicas, each sharded over `world_size / num_replicas` ranks.
        activation_checkpointing_policy: The modules whose activations are computed a second time in backward instead
            of kept: a policy as for `wrap`.
        process_group_backend: The torch.distributed backend of the ranks. None takes the accelerator's.
        timeout: The time that a collective waits for the other ranks before it fails.
        auto_wrap_policy: Lightning Fabric's name of `wrap`.
        sharding_strategy: Lightning Fabric's name for two arguments: `"FULL_SHARD"` is the default,
            `"SHARD_GRAD_OP"` means `reshard_after_forward=False`, `"HYBRID_SHARD"` makes one replica on each node.
        device_mesh: The numbers of replicas and shards for `"HYBRID_SHARD"`.
        state_dict_type: With `"full"`, `save` refuses a path that stands for a folder, unless it gets a format. Under
            both values, the ending of the path decides between one file and a folder.
        start_method: The way in which `Runtime(devices=N)` starts processes: `"popen"` runs the script again;
            `"spawn"`, `"fork"` and `"forkserver"` run the function that `launch` gets. None chooses one.
        others: Further keywords of Lightning Fabric and FSDP1: accepted if `fully_shard` does the same, otherwise
            refused with the reason.

    Raises:
        ConfigurationError: A value is not valid, or two arguments say the same thing.
    """

    name = "fsdp"
    distributed = True
    shards = True

    def __init__(  # noqa: PLR0913 - our names and Fabric's
        self,
        *,
        wrap: ModulePolicy = "auto",
        mixed_precision: MixedPrecisionPolicy | None = None,
        cpu_offload: bool | CPUOffload | None = False,
        reshard_after_forward: bool | int | None = None,
        num_replicas: int | None = None,
        activation_checkpointing_policy: ModulePolicy | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=10),
        auto_wrap_policy: ModulePolicy | None = None,
        sharding_strategy: str | ShardingStrategy | None = None,
        device_mesh: tuple[int, int] | None = None,
        state_dict_type: Literal["sharded", "full"] = "sharded",
        start_method: str | None = None,
        **others: Any,
    ) -> None:
        refuse_for_fsdp(others)
        sharding = Sharding.of(reshard_after_forward, num_replicas, sharding_strategy, device_mesh)
        if activation_checkpointing_policy is not None:
            check_policy(activation_checkpointing_policy, "activation_checkpointing_policy")
        self.wrap = joined_policy(wrap, auto_wrap_policy)
        self.mixed_precision = checked_mixed_precision(mixed_precision)
        self.cpu_offload = offloads(cpu_offload)
        self.reshard_after_forward = sharding.reshard_after_forward
        self.num_replicas = sharding.num_replicas or 1
        self.activation_checkpointing_policy = activation_checkpointing_policy
        self.process_group_backend = checked_backend(process_group_backend)
        self.timeout = checked_timeout(timeout)
        self.saves_one_file = checked_state_dict_type(state_dict_type) == "full"
        self.start_method = checked_start_method(start_method)
        self._sharding = sharding
        self._mesh: DeviceMesh | None = None
        self._averaging = Averaging()

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Build the strategy `"fsdp"`, or `"fsdp_cpu_offload"`, which keeps shards in host memory."""
        strategy = cls(cpu_offload=name == "fsdp_cpu_offload")
        strategy.name = name
        return strategy

    def check(self, composition: Composition) -> None:
        """Refuse numbers that do not divide the number of processes.

        Raises:
            ConfigurationError: `num_replicas` does not divide the number of processes, or `reshard_after_forward` does
                not divide the number of shards.
        """
        world_size = composition.environment.world_size
        if self._sharding.num_replicas is None:
            self.num_replicas = composition.environment.num_nodes
        if self._sharding.num_shards is not None and world_size != self.num_replicas * self._sharding.num_shards:
            raise ConfigurationError(
                f"device_mesh={(self.num_replicas, self._sharding.num_shards)} is for "
                f"{self.num_replicas * self._sharding.num_shards} processes, but there are {world_size}."
            )
        if world_size % self.num_replicas:
            raise ConfigurationError(
                f"num_replicas={self.num_replicas} does not divide the {world_size} processes. Choose a divisor of "
                f"{world_size}, or start another number of processes."
            )
        size, num_shards = self.reshard_after_forward, world_size // self.num_replicas
        if isinstance(size, int) and not isinstance(size, bool) and (size < 1 or num_shards % size):
            raise ConfigurationError(
                f"reshard_after_forward={size} does not divide the {num_shards} shards of a parameter. Choose a "
                f"divisor of {num_shards}, or True, False or None."
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
        """Refuse models that FSDP2 cannot shard.

        Raises:
            ConfigurationError: A parameter cannot be sharded. Nothing has been changed.
        """
        units = find_units(model, self.wrap)
        refuse_unshardable(model, units, whole_parameters(model, units))

    def lay_out(self, model: nn.Module) -> None:
        """Shard the parameters of each unit and of the root, except those that stay whole."""
        units = find_units(model, self.wrap)
        self.shard(model, [unit for _, unit in units], whole_parameters(model, units))

    def shard(self, model: nn.Module, units: Sequence[nn.Module], whole: set[nn.Parameter]) -> None:
        """Shard a model whose units are known.

        Args:
            model: The model.
            units: The modules that become units.
            whole: The parameters that stay whole.
        """
        from torch.distributed.fsdp import fully_shard

        # The module that users call; the parts of a model without a forward are called like roots.
        roots = {id(model), *(id(part) for _, part in parts_of(model))}
        make_root(model)
        for module in (*sorted(units, key=size_of), model):
            make_shardable(module)
            fully_shard(module, **self._arguments(root=id(module) in roots), ignored_params=whole)

    def enclose(self, model: nn.Module) -> nn.Module:
        """Average the gradients of parameters that every rank keeps whole, and let units be copied."""
        self._averaging.add(model, (parameter for parameter in model.parameters() if not is_sharded(parameter)))
        for gathering in gatherings_in(model):
            for unit in gathering.units.values():
                vars(unit)["__deepcopy__"] = ShardedCopy(unit, self)
        return model

    @contextmanager
    def no_backward_sync(self, module: nn.Module) -> Iterator[None]:
        """Accumulate gradients; meanwhile every rank keeps them whole."""
        module.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            with self._averaging.paused(module):
                yield
        finally:
            module.set_requires_gradient_sync(True)  # type: ignore[operator]

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that cannot step shards.

        Raises:
            ConfigurationError: The optimizer cannot step shards. Nothing has been changed.
        """
        refuse_unsteppable(optimizer)

    def optimizer_step_context(self, optimizer: Optimizer) -> AbstractContextManager[object]:
        """Return the context in which an optimizer steps shards."""
        return sharded_step(optimizer)

    def explain(self, error: Exception, module: nn.Module, method: str) -> Exception | None:
        """Say which sharded parameters a method has used outside of the forward that gathers them."""
        return explain_forward(error, module, method)

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
