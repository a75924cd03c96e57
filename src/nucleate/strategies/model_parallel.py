"""Lightning Fabric's strategy whose layout a function of the script makes: `Parallel` with `ParallelizeFunction`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from nucleate.dimensions.function import ParallelizeFunction
from nucleate.errors import ConfigurationError
from nucleate.layout import Mesh
from nucleate.strategies.parallel import Parallel

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from nucleate.plugin import Composition

#: Lightning Fabric's names of axes, and ours.
_NAMES = {"data_parallel": "dp_shard", "tensor_parallel": "tp"}


class ModelParallelStrategy(Parallel):
    """A strategy that lets `parallelize_fn(model, device_mesh)` lay out a model that has no values yet.

    Args:
        parallelize_fn: A function that lays the model out in place by torch's means and returns it. Its mesh has the
            axes `dp_shard` and `tp`, and answers to Lightning Fabric's names `"data_parallel"` and `"tensor_parallel"`
            as well.
        data_parallel_size: The number of ranks along the first axis. `"auto"` is the number of nodes.
        tensor_parallel_size: The number of ranks along the second axis. `"auto"` is the number of processes of a node.
        save_distributed_checkpoint: True saves folders, as nucleate does by itself for a path without an ending. With
            False, `save` refuses a path that stands for a folder, unless it gets a format.
        process_group_backend: The backend of the process group; None lets the accelerator choose.
        timeout: The time that a collective waits for the other ranks before it fails.

    Raises:
        ConfigurationError: `parallelize_fn` cannot be called, or a size is neither `"auto"` nor a number.
    """

    name = "model_parallel"

    def __init__(
        self,
        parallelize_fn: Callable[[Any, DeviceMesh], nn.Module],
        data_parallel_size: int | str = "auto",
        tensor_parallel_size: int | str = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=10),
    ) -> None:
        self._sizes = (data_parallel_size, tensor_parallel_size)
        for name, size in zip(("data_parallel_size", "tensor_parallel_size"), self._sizes, strict=True):
            if isinstance(size, str) and size != "auto":
                raise ConfigurationError(f"{name}={size!r} must be 'auto' or a number of ranks.")
        super().__init__(
            # The sizes follow when the number of nodes is known.
            mesh={"dp_shard": 1, "tp": -1},
            dimensions=[ParallelizeFunction(parallelize_fn, tuple(_NAMES.values()), _NAMES)],
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.saves_one_file = not save_distributed_checkpoint

    def check(self, composition: Composition) -> None:
        """Refuse sizes whose product is not the number of processes.

        Raises:
            ConfigurationError: The two sizes do not fit the number of processes.
        """
        environment = composition.environment
        data, tensor = self._sizes
        data = environment.num_nodes if isinstance(data, str) else data
        tensor = environment.world_size // environment.num_nodes if isinstance(tensor, str) else tensor
        if data * tensor != environment.world_size:
            raise ConfigurationError(
                f"data_parallel_size={data} times tensor_parallel_size={tensor} is not the number of processes, "
                f"{environment.world_size}. Choose sizes with this product."
            )
        self._asked = Mesh.of({"dp_shard": data, "tp": tensor})
        super().check(composition)
