"""Replicas: every rank holds the whole model and exchanges gradients (torch's DistributedDataParallel)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from inspect import signature
from typing import Any, Self

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nucleate.errors import ConfigurationError, name_list
from nucleate.shells import plain_name
from nucleate.strategies.averaging import Averaging, broadcast_buffers
from nucleate.strategies.base import Strategy
from nucleate.strategies.fabric_names import refuse_for_ddp
from nucleate.strategies.group_options import checked_backend, checked_timeout
from nucleate.strategies.module_policy import ModulePolicy, check_policy
from nucleate.strategies.parts import has_forward, parts_of
from nucleate.strategies.start_method import checked_start_method

#: Lightning Fabric's names that say how processes start.
_START_METHODS = {"ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "fork"}


class DDPStrategy(Strategy):
    """A strategy that trains replicas with `torch.nn.parallel.DistributedDataParallel`.

    Each rank makes its replica from the recipes, so no broadcast is needed. Instead, `setup` verifies that all replicas
    are equal. If real tensors differ between ranks, all ranks take those of rank 0.

    Args:
        find_unused_parameters: Search for parameters that a backward will not reach, after each forward.
        static_graph: Promise that every iteration uses the same parameters.
        gradient_as_bucket_view: Keep gradients in the buckets that are exchanged, which saves one copy of them.
        bucket_cap_mb: The size of a bucket in MiB; torch chooses by default.
        sync_buffers: Broadcast rank 0's buffers before each forward that trains. A forward without gradients in
            evaluation mode uses the buffers of its rank.
        activation_checkpointing_policy: The modules whose activations are computed a second time in backward instead
            of kept: `"auto"` finds repeated blocks; or classes of modules; or a function of a module's name and the
            module; or a policy of torch.distributed.fsdp.wrap.
        process_group_backend: The torch.distributed backend of the ranks. None takes the accelerator's.
        timeout: The time that a collective waits for the other ranks before it fails.
        start_method: The way in which `Runtime(devices=N)` starts processes: `"popen"` runs the script again;
            `"spawn"`, `"fork"` and `"forkserver"` run the function that `launch` gets. None chooses one.
        others: Further keywords of Lightning Fabric and DDP, which are refused with the reason.

    Raises:
        ConfigurationError: A value is not valid, or two arguments say the same thing.
    """

    name = "ddp"
    distributed = True

    def __init__(  # noqa: PLR0913 - our names and Fabric's
        self,
        *,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = True,
        bucket_cap_mb: float | None = None,
        sync_buffers: bool = True,
        activation_checkpointing_policy: ModulePolicy | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=10),
        broadcast_buffers: bool | None = None,
        start_method: str | None = None,
        **others: Any,
    ) -> None:
        refuse_for_ddp(others)
        if broadcast_buffers is not None and not sync_buffers:
            raise ConfigurationError(
                f"sync_buffers={sync_buffers!r} and broadcast_buffers={broadcast_buffers!r} are two names of one "
                "option. Give one."
            )
        if activation_checkpointing_policy is not None:
            check_policy(activation_checkpointing_policy, "activation_checkpointing_policy")
        self.find_unused_parameters = find_unused_parameters
        self.static_graph = static_graph
        self.gradient_as_bucket_view = gradient_as_bucket_view
        self.bucket_cap_mb = bucket_cap_mb
        self.sync_buffers = sync_buffers if broadcast_buffers is None else broadcast_buffers
        self.activation_checkpointing_policy = activation_checkpointing_policy
        self.process_group_backend = checked_backend(process_group_backend)
        self.timeout = checked_timeout(timeout)
        self.start_method = checked_start_method(start_method)
        self._averaging = Averaging()

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Build the strategy `"ddp"`; Lightning Fabric's longer names hold a start method or `true` or `false`."""
        strategy = cls(
            find_unused_parameters=name.endswith("_find_unused_parameters_true"),
            start_method=_START_METHODS.get(name),
        )
        strategy.name = name
        return strategy

    def module_init_context(self) -> AbstractContextManager[object]:
        """Return a context without effect: construction needs nothing special."""
        return nullcontext()

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that has a `DistributedDataParallel` inside.

        Raises:
            ConfigurationError: A part of the model is a `DistributedDataParallel` already.
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

    def enclose(self, model: nn.Module) -> nn.Module:
        """Wrap the model in DDP.

        A model without trained parameters stays unwrapped, because DDP refuses it. A model without a forward stays
        unwrapped too: DDP acts only around forward. The gradients of its parameters are averaged one by one.
        """
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
        if not has_forward(model):
            return module
        if isinstance(module, DistributedDataParallel):
            # The old exchange hooks onto the gradients until its last reference is gone.
            del module.logger, module.reducer
        return self.enclose(model)

    def _buffer_arguments(self) -> dict[str, bool]:
        if self.sync_buffers:
            return {}
        # torch 2.13 renamed the argument and warns about the old name.
        renamed = "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters
        return {"forward_sync_buffers" if renamed else "broadcast_buffers": False}

    def exchanges(self, call: str, module: nn.Module | None = None) -> bool:
        """Return True for backward, and for a forward before which rank 0 sends its buffers."""
        if call == "backward":
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
        return module.no_sync() if isinstance(module, DistributedDataParallel) else self._averaging.paused(module)

    def guards_methods(self, module: nn.Module) -> bool:
        """Return True for a DDP module: its own forward prepares the exchange, so bypassing it loses gradients."""
        return isinstance(module, DistributedDataParallel)
