"""The strategy of many axes: dimensions of parallelism on one mesh, applied from the inner to the outer ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from nucleate.dimensions.base import Dimension
from nucleate.dimensions.ordering import ordered
from nucleate.dimensions.sharding.sharded_step import sharded_step
from nucleate.errors import ConfigurationError, name_list
from nucleate.layout import DATA_AXES, Layout, Mesh
from nucleate.materialize.handover import Before
from nucleate.registry import DIMENSIONS
from nucleate.strategies.base import Strategy
from nucleate.strategies.group_options import checked_backend, checked_timeout
from nucleate.strategies.planned_layout import planned_layout
from nucleate.strategies.start_method import checked_start_method
from nucleate.strategies.zero_state import is_zero, zero_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from nucleate.cluster.environment import Environment
    from nucleate.plugin import Composition


class Parallel(Strategy):
    """A strategy that applies dimensions of parallelism, each on its axes of one mesh.

    Args:
        mesh: The size of each axis by its name, from the outer to the inner ones, such as
            `{"dp_replicate": 1, "dp_shard": -1, "tp": 2}`. One may be -1: it gets the rest of the ranks. The sizes are
            held against the number of processes when they start.
        dimensions: Dimensions or their names, in any order; each says which ones it wraps around.
        process_group_backend: The torch.distributed backend of the ranks. None takes the accelerator's.
        timeout: The time that a collective waits for the other ranks before it fails.
        start_method: The way in which `Runtime(devices=N)` starts processes; see `FSDPStrategy`.

    Raises:
        ConfigurationError: A value is not valid, an axis has no dimension or a dimension no axis, two dimensions do the
            same, or they cannot be ordered.
        PluginNotFoundError: No dimension has that name.

    Example:
        >>> from nucleate.dimensions import FullyShard, TensorParallel
        >>> plan = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}
        >>> strategy = Parallel(mesh={"dp_shard": -1, "tp": 2}, dimensions=[FullyShard(), TensorParallel(plan)])
        >>> print(strategy.mesh_for(1024))
        dp_shard=512 x tp=2
    """

    name = "parallel"
    distributed = True

    def __init__(
        self,
        *,
        mesh: Mapping[str, int] | Mesh,
        dimensions: Iterable[Dimension | str],
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=10),
        start_method: str | None = None,
    ) -> None:
        if not isinstance(mesh, (Mapping, Mesh)):
            raise ConfigurationError(
                f"mesh={mesh!r} must give each axis its size, such as {{'dp_shard': -1, 'tp': 2}}."
            )
        self._asked = mesh if isinstance(mesh, Mesh) else Mesh.of(mesh)
        if isinstance(dimensions, (str, Dimension)):
            dimensions = [dimensions]
        self.dimensions = ordered([cast(Dimension, DIMENSIONS.choose(dimension)) for dimension in dimensions])
        self._refuse_unfit()
        self.process_group_backend = checked_backend(process_group_backend)
        self.timeout = checked_timeout(timeout)
        self.start_method = checked_start_method(start_method)
        self._connected: Mesh | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The mesh of this process holds process groups.
        return {**vars(self), "_connected": None}

    def _refuse_unfit(self) -> None:
        """Refuse a mesh and dimensions that do not belong together."""
        used = {axis for dimension in self.dimensions for axis in dimension.axes}
        for dimension in self.dimensions:
            if dimension.axes and dimension.axes[-1] not in self._asked.axes:
                raise ConfigurationError(
                    f"the dimension {dimension!r} needs the axis {dimension.axes[-1]!r}, and the mesh has the axes "
                    f"{name_list(self._asked.axes)}. Add the axis, or leave the dimension out."
                )
        idle = [axis for axis in self._asked.axes if axis not in used and self._asked.size_of(axis) != 1]
        if idle:
            raise ConfigurationError(
                f"no dimension uses the axis {name_list(idle)} of the mesh {self._asked}. Give a dimension for it, "
                f"such as {_DIMENSION_OF.get(idle[0], 'one of your own')}, or leave the axis out."
            )
        names = {dimension.name for dimension in self.dimensions}
        for dimension in self.dimensions:
            if excluded := names.intersection(dimension.excludes):
                raise ConfigurationError(
                    f"the dimension {dimension!r} does not work beside {name_list(sorted(excluded))}. Leave one of "
                    "them out."
                )
        averaging = [dimension for dimension in self.dimensions if dimension.exchanges_gradients]
        if len(averaging) > 1:
            raise ConfigurationError(
                f"{name_list(map(repr, averaging))} all average gradients over the data axes. Give one of them: "
                "FullyShard with an axis dp_replicate in the mesh keeps replicas of shards."
            )

    def check(self, composition: Composition) -> None:
        """Let each dimension refuse the other parts of a `Runtime`."""
        for dimension in self.dimensions:
            dimension.check(composition)

    def connect(self, device: torch.device, environment: Environment) -> None:
        """Store the device and the rank of this process, and hold the mesh against the number of ranks.

        Raises:
            ConfigurationError: The sizes of the axes do not give the number of ranks.
        """
        super().connect(device, environment)
        self._connected = self.mesh_for(environment.world_size)
        for dimension in self.dimensions:
            dimension.connect(device, self._connected)

    def mesh_for(self, world_size: int) -> Mesh:
        """Return the mesh of any number of ranks. No process group is needed.

        Raises:
            ConfigurationError: The sizes of the axes do not give the number of ranks.
        """
        return self._asked.fitted(world_size)

    def planned_layout(self, model: nn.Module, world_size: int) -> Layout | None:
        """Return the layout that `setup` will make, for any number of ranks. No process group is needed.

        Args:
            model: A model that was not set up. Its tensors may be deferred, or on the meta device.
            world_size: The number of ranks.

        Returns:
            The layout, or None if a function of the user decides.

        Raises:
            ConfigurationError: The mesh does not fit the number of ranks, or a dimension refuses the model.
        """
        mesh = self.mesh_for(world_size)
        acting = [dimension for dimension in self.dimensions if dimension.acts(mesh)]
        with torch._C.DisableTorchFunctionSubclass():
            for dimension in acting:
                dimension.check_model(model, mesh)
            return planned_layout(model, acting, mesh)

    @property
    def mesh(self) -> Mesh:
        """The mesh: of the ranks of this run, or as it was asked for before they have started."""
        return self._connected or self._asked

    @property
    def device_mesh(self) -> DeviceMesh:
        """Torch's mesh of the ranks of this run. The process group must run."""
        return self.mesh.device_mesh(self.device.type)

    @property
    def shards(self) -> bool:  # type: ignore[override]
        """Whether a dimension replaces tensors by DTensors."""
        return any(dimension.lays_out for dimension in self.dimensions)

    @property
    def data_parallel_size(self) -> int:
        """The number of ranks that split the data."""
        return self._data_place[1]

    @property
    def data_parallel_rank(self) -> int:
        """The number of this rank's part of the data."""
        return self._data_place[0]

    @property
    def _data_place(self) -> tuple[int, int]:
        mesh = self._connected or self.mesh_for(self.environment.world_size)
        return mesh.place(self.environment.global_rank, DATA_AXES)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the mesh, and `"data"` for the ranks that split the data."""
        return (*self.mesh.axes, "data")

    def group_of(self, axis: str) -> Any:
        """Return the process group of this rank along one of `axes`. Every rank must call it."""
        return self.mesh.group(self.device.type, DATA_AXES if axis == "data" else (axis,))

    @property
    def storage_device(self) -> torch.device:
        """The device that keeps the tensors that the dimensions have laid out."""
        devices = [dimension.storage_device for dimension in self.dimensions]
        return next((device for device in devices if device is not None), self.device)

    def module_init_context(self) -> AbstractContextManager[object]:
        """Return a context without effect: construction is already cheap because it is deferred."""
        return nullcontext()

    def check_model(self, model: nn.Module) -> None:
        """Let each dimension refuse the model.

        Raises:
            ConfigurationError: A dimension cannot lay this model out. Nothing has been changed.
        """
        for dimension in self._acting:
            dimension.check_model(model, self.mesh)

    def lay_out(self, model: nn.Module) -> None:
        """Apply the dimensions, the inner ones first. Tied parameters stay tied."""
        before = Before(model)
        for dimension in self._acting:
            dimension.apply(model, cast(Any, self.device_mesh if dimension.lays_out else None))
            before.tie_again(model)

    def enclose(self, model: nn.Module) -> nn.Module:
        """Let each dimension put a module around the model, the inner ones first."""
        for dimension in self._acting:
            model = dimension.enclose(model)
        return model

    def step_context(self) -> AbstractContextManager[object]:
        """Return the contexts of all dimensions."""
        return _all_of([dimension.step_context() for dimension in self._overriding("step_context")])

    def exchanges(self, call: str, module: nn.Module | None = None) -> bool:
        """Return whether a dimension exchanges tensors in a call."""
        return any(dimension.exchanges(call, module) for dimension in self._acting)

    def evaluation_context(self, module: nn.Module) -> AbstractContextManager[object]:
        """Return the contexts of all dimensions."""
        return _all_of([dimension.evaluation_context(module) for dimension in self._overriding("evaluation_context")])

    def no_backward_sync(self, module: nn.Module) -> AbstractContextManager[object]:
        """Return the contexts of all dimensions."""
        return _all_of([dimension.no_backward_sync(module) for dimension in self._overriding("no_backward_sync")])

    def guards_methods(self, module: nn.Module) -> bool:
        """Return whether a method that calls forward itself would bypass a dimension."""
        return any(dimension.guards_methods(module) for dimension in self._acting)

    def renew(self, model: nn.Module, module: nn.Module) -> nn.Module:
        """Let each dimension return the module to call."""
        for dimension in self._acting:
            module = dimension.renew(model, module)
        return module

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Let each dimension refuse an optimizer.

        Raises:
            ConfigurationError: A dimension cannot step this optimizer. Nothing has been changed.
        """
        for dimension in self._acting:
            dimension.check_optimizer(optimizer)

    def optimizer_step_context(self, optimizer: Optimizer) -> AbstractContextManager[object]:
        """Return the context in which an optimizer steps DTensors."""
        for dimension in self._overriding("before_step"):
            dimension.before_step()
        return sharded_step(optimizer) if self.shards else nullcontext()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer to save; that of a `ZeroRedundancyOptimizer` from each rank's own part."""
        if is_zero(optimizer):
            return zero_state(optimizer, self.communicator)
        return super().optimizer_state(optimizer)

    def explain(self, error: Exception, module: nn.Module, method: str) -> Exception | None:
        """Return the first explanation of a dimension, outer ones first."""
        found = (dimension.explain(error, module, method) for dimension in reversed(self._acting))
        return next((explanation for explanation in found if explanation is not None), None)

    @property
    def _acting(self) -> list[Dimension]:
        return [dimension for dimension in self.dimensions if dimension.acts(self.mesh)]

    def _overriding(self, method: str) -> list[Dimension]:
        """Return the acting dimensions with a method of their own: steps must not pay for the others."""
        default = getattr(Dimension, method)
        return [dimension for dimension in self._acting if getattr(type(dimension), method) is not default]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.mesh}, {', '.join(map(repr, self.dimensions))})"


#: The dimension that a message suggests for an axis.
_DIMENSION_OF = {"dp_replicate": "Replicate()", "dp_shard": "FullyShard()", "tp": "TensorParallel(plan)"}


def _all_of(contexts: list[AbstractContextManager[object]]) -> AbstractContextManager[object]:
    """Return one context for several."""
    if len(contexts) == 1:
        return contexts[0]
    return _entered(contexts) if contexts else nullcontext()


@contextmanager
def _entered(contexts: list[AbstractContextManager[object]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
