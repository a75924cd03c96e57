"""A strategy whose layout a function of the script makes, over two axes of ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from nucleate.errors import ConfigurationError
from nucleate.strategies.base import Strategy

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from nucleate.plugin import Composition


class ModelParallelStrategy(Strategy):
    """A strategy that lets `parallelize_fn(model, device_mesh)` shard a model that has no values yet.

    Args:
        parallelize_fn: A function that shards the model in place by torch's means and returns it. Its mesh has the axes
            `"data_parallel"` and `"tensor_parallel"`.
        data_parallel_size: The number of ranks along the first axis. `"auto"` is the number of nodes.
        tensor_parallel_size: The number of ranks along the second axis. `"auto"` is the number of processes of a node.
        save_distributed_checkpoint: True saves folders, as nucleate does by itself for a path without an ending.
        process_group_backend: The backend of the process group; None lets the accelerator choose.
        timeout: The time that a collective waits for the other ranks before it fails.
    """

    name = "model_parallel"
    distributed = True
    shards = True

    def __init__(
        self,
        parallelize_fn: Callable[[Any, DeviceMesh], nn.Module],
        data_parallel_size: int | str = "auto",
        tensor_parallel_size: int | str = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        if not callable(parallelize_fn):
            raise ConfigurationError(f"parallelize_fn={parallelize_fn!r} must be a function of a model and a mesh.")
        self._parallelize = parallelize_fn
        self._sizes = (data_parallel_size, tensor_parallel_size)
        self.process_group_backend = process_group_backend
        self.timeout = timeout or type(self).timeout
        self._mesh: DeviceMesh | None = None

    def check(self, composition: Composition) -> None:
        """Refuse sizes whose product is not the number of processes.

        Raises:
            ConfigurationError: The two sizes do not fit the number of processes.
        """
        environment = composition.environment
        data, tensor = self._shape(environment.num_nodes, environment.world_size)
        if data * tensor != environment.world_size:
            raise ConfigurationError(
                f"data_parallel_size={data} times tensor_parallel_size={tensor} is not the number of processes, "
                f"{environment.world_size}. Choose sizes with this product."
            )

    def _shape(self, num_nodes: int, world_size: int) -> tuple[int, int]:
        data, tensor = self._sizes
        return (
            num_nodes if isinstance(data, str) else data,
            world_size // num_nodes if isinstance(tensor, str) else tensor,
        )

    @property
    def device_mesh(self) -> DeviceMesh:
        """The mesh with the axes `"data_parallel"` and `"tensor_parallel"`."""
        if self._mesh is None:
            from torch.distributed.device_mesh import init_device_mesh

            shape = self._shape(self.environment.num_nodes, self.environment.world_size)
            names = ("data_parallel", "tensor_parallel")
            self._mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        return self._mesh

    @property
    def data_parallel_size(self) -> int:
        """The number of ranks that split the data."""
        return self._shape(self.environment.num_nodes, self.environment.world_size)[0]

    @property
    def data_parallel_rank(self) -> int:
        """The number of this rank's part of the data."""
        tensor = self._shape(self.environment.num_nodes, self.environment.world_size)[1]
        return self.environment.global_rank // tensor

    def module_init_context(self) -> AbstractContextManager[object]:
        """Return a context without effect: construction is already cheap because it is deferred."""
        return nullcontext()

    def lay_out(self, model: nn.Module) -> None:
        """Call the script's function.

        Raises:
            ConfigurationError: The function returned another model.
        """
        result = self._parallelize(model, self.device_mesh)
        if result is not model:
            raise ConfigurationError(
                f"parallelize_fn must change the model in place and return it, not {type(result).__name__}."
            )
