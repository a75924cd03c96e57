"""Shards: every rank holds a part of each parameter and gathers one unit at a time (torch's FSDP2).

Parameters are sharded while they are still deferred; each rank then materializes its shards. Policies are passed as
keywords. Parameters that FSDP2 cannot shard are refused by name before any change. Parameters without a dimension, such
as a temperature, are allowed: every rank keeps them, and this strategy averages their gradients.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import nn

from nucleate.cluster.communicator import Communicator
from nucleate.devices import hooks_of
from nucleate.errors import ConfigurationError, name_list
from nucleate.layout.agreement import broadcast_real, verify_replicas
from nucleate.materialize import Plan, execute
from nucleate.shells import named_parameters
from nucleate.strategies.base import Strategy
from nucleate.strategies.sharded_class import make_shardable
from nucleate.strategies.wrap_policy import WrapPolicy, find_units

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

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
        """The device mesh, with the axis `shard`; with replicas, the axis `replicate` comes first."""
        if self._mesh is None:
            from torch.distributed.device_mesh import init_device_mesh

            world_size = self.environment.world_size
            if self.num_replicas == 1:
                shape, names = (world_size,), ("shard",)
            else:
                shape, names = (self.num_replicas, world_size // self.num_replicas), ("replicate", "shard")  # type: ignore[assignment]
            self._mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        return self._mesh

    def module_init_context(self) -> AbstractContextManager[object]:
        """Return a context without effect: construction is already cheap because it is deferred."""
        return nullcontext()

    def setup(self, model: nn.Module) -> nn.Module:
        """Shard the model, and materialize this rank's part of every parameter.

        Raises:
            ConfigurationError: A parameter cannot be sharded. Nothing has been changed.
            UninitializedError: See `nucleate.materialize.Plan.of`.
        """
        import torch
        from torch.distributed.fsdp import fully_shard

        plan = Plan.of(model)
        units = find_units(model, self.wrap)
        # The checks need only metadata, so they read the underlying meta tensors without the cost of the guards.
        with torch._C.DisableTorchFunctionSubclass():
            _refuse_unshardable(model, units, plan)
        communicator = Communicator(self.environment, self.device)
        plan.release()
        # Each rank cuts its shard from its own copy of a real parameter, so all copies must be equal.
        broadcast_real(model, communicator)
        hooks = {name: p._post_accumulate_grad_hooks for name, p in model.named_parameters(remove_duplicate=False)}
        attributes = {name: _attributes(p) for name, p in model.named_parameters(remove_duplicate=False)}
        scalars = {parameter for parameter in model.parameters() if parameter.dim() == 0}
        for module in (*(unit for _, unit in units), model):
            make_shardable(module)
        for _, unit in units:
            fully_shard(unit, **self._arguments(root=False), ignored_params=scalars)
        fully_shard(model, **self._arguments(root=True), ignored_params=scalars)
        # If one rank cannot read a file, the other ranks must not wait for it below.
        with communicator.all_or_none("making parameters"):
            execute(plan, model, self.device, torch.device("cpu") if self.cpu_offload else self.device)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            for key, value in attributes[name].items():
                setattr(parameter, key, value)
            if hooks[name]:
                parameter._post_accumulate_grad_hooks = hooks[name]
        for parameter in scalars:
            self._average_gradient(parameter, weakref.ref(model))
        verify_replicas(model, communicator)
        return model

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

    def _average_gradient(self, parameter: nn.Parameter, model: weakref.ref[nn.Module]) -> None:
        """Average the gradient of a parameter that every rank keeps whole, as FSDP averages gradients of shards."""
        import torch.distributed as dist

        def average(parameter: torch.Tensor) -> None:
            # A gradient from an earlier exchange is equal on all ranks, so the average of the sum is right too.
            if model() not in self._accumulating and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(self.environment.world_size)

        if parameter.requires_grad:
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


def _attributes(parameter: nn.Parameter) -> dict[str, Any]:
    """Return the attributes that users set on a parameter; FSDP makes a new object without them."""
    return {key: value for key, value in vars(parameter).items() if not key.startswith("_nucleate")}


def _refuse_unshardable(model: nn.Module, units: list[tuple[str, nn.Module]], plan: Plan) -> None:
    parameters = dict(named_parameters(model))
    strided = [name for name, p in parameters.items() if not p.is_contiguous()]
    if strided:
        raise ConfigurationError(
            f"FSDP cannot shard parameters that are not contiguous: {name_list(strided)}. Make them contiguous in the "
            "constructor, or use strategy='ddp'."
        )
    hooked = [name for name, p in parameters.items() if p._backward_hooks]
    if hooked:
        raise ConfigurationError(
            f"{name_list(hooked)} have hooks on their gradient (`register_hook`), which FSDP never calls. Use "
            "`register_post_accumulate_grad_hook`, which FSDP calls, or strategy='ddp'."
        )
    owner = {id(p): name for name, unit in [("", model), *reversed(units)] for p in unit.parameters()}
    dtypes: dict[str, dict[torch.dtype, str]] = {}
    for name, parameter in parameters.items():
        # Frozen parameters may have any dtype: only gradients must have the same dtype
        # (`FSDPParamGroup._init_mp_dtypes` in torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py, 2.13). Each
        # parameter is gathered as bytes.
        if parameter.requires_grad and parameter.dim() > 0:
            dtypes.setdefault(owner[id(parameter)], {}).setdefault(parameter.dtype, name)
    for unit_name, found in dtypes.items():
        if len(found) > 1:
            listed = ", ".join(f"{name} is {dtype}" for dtype, name in found.items())
            raise ConfigurationError(
                "the trained parameters of one FSDP unit must have one dtype, but in "
                f"{unit_name or 'the root'} {listed}. Cast them to one dtype, freeze those of one dtype, or name a "
                "module that holds only one dtype in `wrap`."
            )
    for group in plan.groups:
        views = [t for t in group.targets if any(holder.kind == "parameter" for holder in t.holders)]
        spans = sorted((t.ref.offset * t.ref.dtype.itemsize, t.size_bytes, t.fqn) for t in views)
        for (start, size, first), (following, _, second) in pairwise(spans):
            if start + size > following:
                raise ConfigurationError(
                    f"{first} and {second} are different parameters that share memory, which shards cannot do. Tie "
                    "them by assigning the same parameter, or use strategy='ddp'."
                )
