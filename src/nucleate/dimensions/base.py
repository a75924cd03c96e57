"""The base class of dimensions: one kind of parallelism, or one change of a model's modules, on some axes of a mesh."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from nucleate.layout import Mesh, Placement
from nucleate.plugin import Named

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from nucleate.plugin import Composition

#: For the FQN of each tensor that a dimension lays out, the placement on each axis that splits it.
Placements = Mapping[str, Mapping[str, Placement]]


class Dimension(Named):
    """A plugin that lays a model out along some axes of a mesh. `Parallel` applies several of them, one after another.

    Required: `name` and `apply(model, mesh)`. A dimension that lays tensors out also has `axes` and `placements`.
    It knows neither a strategy nor the other dimensions, except for their names in `after` and `before`.

    Everything else has a working default.

    Attributes:
        axes: The names of the axes of the mesh along which the dimension acts. The mesh must have the last one; those
            before it may be absent.
        after: The names of the dimensions that are applied before this one, if they are there. It wraps around them:
            it lays out the tensors that they have left.
        before: The names of the dimensions that are applied after this one, if they are there, such as
            `"fully_shard"`: they wrap around it, and need not know it.
        excludes: The names of dimensions that cannot stand beside this one.
        lays_out: Whether tensors become DTensors, so that optimizers and clipping meet them.
        exchanges_gradients: Whether the dimension averages gradients over the axes along which data are split. The
            strategy takes exactly one such dimension if the mesh has such axes.
        device: This process's device, set by `connect`.
        mesh: The mesh, set by `connect`.
    """

    kind: ClassVar[str] = "dimension"
    axes: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    lays_out: bool = False
    exchanges_gradients: bool = False

    device: torch.device = torch.device("cpu")
    mesh: Mesh = Mesh((), ())

    def connect(self, device: torch.device, mesh: Mesh) -> None:
        """Store the device of this process and the mesh. The process group runs.

        Args:
            device: The device.
            mesh: The mesh, of all ranks. Its sizes are known.

        Raises:
            ConfigurationError: A number that the user gave does not fit the mesh.
        """
        self.device = device
        self.mesh = mesh

    def check(self, composition: Composition) -> None:
        """Refuse parts of a `Runtime` that this dimension does not work with. By default, do nothing.

        Raises:
            ConfigurationError: It does not work with them.
        """

    def acts(self, mesh: Mesh) -> bool:
        """Return whether the dimension does anything on a mesh: by default, where one of its axes has several ranks."""
        return not self.axes or any(mesh.size_of(axis) > 1 for axis in self.axes)

    def check_model(self, model: nn.Module, mesh: Mesh) -> None:
        """Refuse a model that this dimension cannot lay out, before anything is changed. By default, do nothing.

        Args:
            model: The model, which no dimension has changed yet. Its deferred tensors appear as meta tensors.
            mesh: The mesh.

        Raises:
            ConfigurationError: The dimension cannot lay this model out; the message gives the FQNs.
        """

    def placements(self, model: nn.Module, mesh: Mesh) -> Placements | None:
        """Return how `apply` will lay tensors out, as plain data. No process group is needed.

        Each placement says how an axis splits the part of the tensor that the dimensions before this one have left.

        Args:
            model: The model, which no dimension has changed yet. Its deferred tensors appear as meta tensors.
            mesh: The mesh. It may be larger than the run, to ask about another number of ranks.

        Returns:
            The placements of all tensors that become DTensors, by FQN. A tied tensor may stand under any of its names.
            Axes that do not split a tensor may be left out. None if they are known only after `apply`, because a
            function of the user decides.
        """
        return {}

    @abstractmethod
    def apply(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Lay the model out in place, by torch's own means.

        Deferred tensors are on the meta device here, and have no values. This method must not make values, and must not
        exchange any. Real tensors are equal on all ranks.

        Args:
            model: The model.
            mesh: torch's mesh of all ranks, with the names of the axes. Only a dimension with `lays_out` gets it: torch
                makes process groups for it.
        """

    def enclose(self, model: nn.Module) -> nn.Module:
        """Return the module whose forward the user calls: by default the model itself.

        Args:
            model: The model, laid out by all dimensions, with the values of all its tensors.
        """
        return model

    def owns(self, fqn: str) -> bool:
        """Return whether this rank has a tensor at all: by default every rank has every tensor, or a part of it."""
        return True

    @property
    def storage_device(self) -> torch.device | None:
        """The device that keeps the tensors that were laid out; None, the default, for the device of this process."""
        return None

    def step_context(self) -> AbstractContextManager[object]:
        """Return the context that surrounds each forward, each backward and, in `forward_backward`, the loss."""
        return nullcontext()

    def exchanges(self, call: str, module: nn.Module | None = None) -> bool:
        """Return whether every rank must make a call; see `Strategy.exchanges`. By default, if it lays tensors out."""
        return self.lays_out

    def no_backward_sync(self, module: nn.Module) -> AbstractContextManager[object]:
        """Return a context in which backward accumulates gradients without exchanging them over the data axes.

        Args:
            module: The module that the strategy's `setup` returned.
        """
        return nullcontext()

    def evaluation_context(self, module: nn.Module) -> AbstractContextManager[object]:
        """Return the context that surrounds a forward without gradients of a model in evaluation mode."""
        return nullcontext()

    def guards_methods(self, module: nn.Module) -> bool:
        """Return whether a method that calls forward itself would bypass this dimension."""
        return False

    def renew(self, model: nn.Module, module: nn.Module) -> nn.Module:
        """Return the module to call after other parameters of the model came to require gradients than before."""
        return module

    def explain(self, error: Exception, module: nn.Module, method: str) -> Exception | None:
        """Return a better error for one that a method of the model has raised because of this dimension, or None."""
        return None

    def before_step(self) -> None:
        """Do what must happen before an optimizer steps. By default, do nothing. Every rank calls it."""

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer of a kind that cannot step with this dimension. By default, do nothing.

        Raises:
            ConfigurationError: The message says which optimizer can.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
