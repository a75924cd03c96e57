"""The strategy of replicas: `Parallel` with the dimension `Replicate`, under Lightning Fabric's name and keywords."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Self

from nucleate.dimensions.base import Dimension
from nucleate.dimensions.checkpointing import ActivationCheckpointing
from nucleate.dimensions.module_policy import ModulePolicy
from nucleate.dimensions.replicate import Replicate
from nucleate.errors import ConfigurationError
from nucleate.strategies.fabric_names import refuse_for_ddp
from nucleate.strategies.parallel import Parallel

#: Lightning Fabric's names that say how processes start.
_START_METHODS = {"ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "fork"}


class DDPStrategy(Parallel):
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
        #: The dimension that exchanges gradients.
        self.replicas = Replicate(
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
            gradient_as_bucket_view=gradient_as_bucket_view,
            bucket_cap_mb=bucket_cap_mb,
            sync_buffers=sync_buffers if broadcast_buffers is None else broadcast_buffers,
        )
        dimensions: list[Dimension] = [self.replicas]
        if activation_checkpointing_policy is not None:
            dimensions.append(ActivationCheckpointing(activation_checkpointing_policy))
        super().__init__(
            mesh={"dp_replicate": -1},
            dimensions=dimensions,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Build the strategy `"ddp"`; Lightning Fabric's longer names hold a start method or `true` or `false`."""
        strategy = cls(
            find_unused_parameters=name.endswith("_find_unused_parameters_true"),
            start_method=_START_METHODS.get(name),
        )
        strategy.name = name
        return strategy
