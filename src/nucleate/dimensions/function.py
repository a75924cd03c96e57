"""A user's function that lays a model out by torch's means, as a dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from nucleate.dimensions.base import Dimension, Placements
from nucleate.errors import ConfigurationError
from nucleate.layout import Mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: Lays a model out in place, and returns it or None.
Parallelize = Callable[[Any, Any], Any]


class ParallelizeFunction(Dimension):
    """A function `parallelize_fn(model, mesh)` that lays a model out. It exchanges gradients too, where data are split.

    Args:
        function: Changes the model in place by torch's means, such as `parallelize_module` and `fully_shard`. The model
            has no values yet. The mesh is torch's, of all ranks, with the names of the axes.
        axes: The names of the axes that the function uses.
        aliases: Other names for axes, by which the function may ask for them.

    Raises:
        ConfigurationError: `function` cannot be called.
    """

    name = "parallelize_function"
    lays_out = True
    exchanges_gradients = True

    def __init__(
        self,
        function: Parallelize,
        axes: tuple[str, ...] = ("dp_shard", "tp"),
        aliases: dict[str, str] | None = None,
    ) -> None:
        if not callable(function):
            raise ConfigurationError(f"parallelize_fn={function!r} must be a function of a model and a mesh.")
        self.axes = axes
        self._function = function
        self._aliases = dict(aliases or {})

    def acts(self, mesh: Mesh) -> bool:
        """Return True: the function decides."""
        return True

    def placements(self, model: nn.Module, mesh: Mesh) -> Placements | None:
        """Return None: the layout is read off after the function has run."""
        return None

    def apply(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Call the function.

        Raises:
            ConfigurationError: The function returned another model.
        """
        result = self._function(model, self._with_aliases(mesh))
        if result is not None and result is not model:
            raise ConfigurationError(
                f"parallelize_fn must change the model in place and return it, not {type(result).__name__}."
            )

    @contextmanager
    def no_backward_sync(self, module: nn.Module) -> Iterator[None]:
        """Accumulate gradients in the units of `fully_shard` that the function has made."""
        units: list[Any] = [part for part in module.modules() if hasattr(part, "set_requires_gradient_sync")]
        for unit in units:
            unit.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_requires_gradient_sync(True, recurse=False)

    def _with_aliases(self, mesh: DeviceMesh) -> DeviceMesh:
        if not self._aliases:
            return mesh
        from nucleate.dimensions.aliased_mesh import AliasedMesh

        return AliasedMesh.of(mesh, self._aliases)
