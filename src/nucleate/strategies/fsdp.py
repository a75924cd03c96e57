"""The strategy of shards: `Parallel` with the dimension `FullyShard`, under Lightning Fabric's name and keywords."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Self

from nucleate.dimensions.base import Dimension
from nucleate.dimensions.checkpointing import ActivationCheckpointing
from nucleate.dimensions.fully_shard import FullyShard
from nucleate.dimensions.module_policy import ModulePolicy
from nucleate.errors import ConfigurationError
from nucleate.layout import Mesh
from nucleate.strategies.fabric_names import (
    Sharding,
    checked_mixed_precision,
    checked_state_dict_type,
    joined_policy,
    offloads,
    refuse_for_fsdp,
)
from nucleate.strategies.parallel import Parallel

if TYPE_CHECKING:
    from torch.distributed.fsdp import CPUOffload, MixedPrecisionPolicy, ShardingStrategy

    from nucleate.plugin import Composition


class FSDPStrategy(Parallel):
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
        #: The dimension that shards.
        self.units = FullyShard(
            wrap=joined_policy(wrap, auto_wrap_policy),
            mixed_precision=checked_mixed_precision(mixed_precision),
            cpu_offload=offloads(cpu_offload),
            reshard_after_forward=sharding.reshard_after_forward,
        )
        dimensions: list[Dimension] = [self.units]
        if activation_checkpointing_policy is not None:
            dimensions.append(ActivationCheckpointing(activation_checkpointing_policy))
        self.num_replicas = sharding.num_replicas or 1
        super().__init__(
            mesh=self._mesh_of_replicas(),
            dimensions=dimensions,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self.saves_one_file = checked_state_dict_type(state_dict_type) == "full"
        self._sharding = sharding

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Build `"fsdp"`, `"fsdp_cpu_offload"` (shards in host memory) or `"hsdp"` (a replica on each node)."""
        strategy = cls(
            cpu_offload=name == "fsdp_cpu_offload", sharding_strategy="HYBRID_SHARD" if name == "hsdp" else None
        )
        strategy.name = name
        return strategy

    def check(self, composition: Composition) -> None:
        """Refuse numbers that do not divide the number of processes.

        Raises:
            ConfigurationError: `num_replicas` does not divide the number of processes, or `reshard_after_forward` does
                not divide the number of shards.
        """
        super().check(composition)
        world_size = composition.environment.world_size
        if self._sharding.num_replicas is None:
            self.num_replicas = composition.environment.num_nodes
            self._asked = self._mesh_of_replicas()
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
        self.units.check_shards(world_size // self.num_replicas)

    def _mesh_of_replicas(self) -> Mesh:
        replicas = {"dp_replicate": self.num_replicas} if self.num_replicas > 1 else {}
        return Mesh.of({**replicas, "dp_shard": -1})
