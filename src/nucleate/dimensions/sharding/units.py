"""Units: the modules that `fully_shard` or `replicate` handles one at a time, and the root around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from nucleate.dimensions.averaging import Averaging
from nucleate.dimensions.module_policy import ModulePolicy
from nucleate.dimensions.parts import parts_of
from nucleate.dimensions.sharding.gathering import gatherings_in
from nucleate.dimensions.sharding.sharded_class import make_root, make_shardable
from nucleate.dimensions.sharding.sharded_copy import ShardedCopy
from nucleate.dimensions.sharding.wrap_policy import find_units, size_of, whole_parameters
from nucleate.layout import is_sharded


class Wrapper(Protocol):
    """The call of torch that makes one module a unit."""

    def __call__(self, module: nn.Module, is_root: bool, whole: set[nn.Parameter]) -> None:
        """Make a module a unit.

        Args:
            module: The module.
            is_root: Whether users call the module itself.
            whole: The parameters that the unit does not take.
        """


class Units:
    """The units of models that one dimension has made.

    Args:
        wrap: The policy that chooses them.
        wrapper: Makes one module a unit.
        replicates: Whether `replicate` makes the units, not `fully_shard`.
    """

    def __init__(self, wrap: ModulePolicy, wrapper: Wrapper, replicates: bool = False) -> None:
        self._wrap = wrap
        self._wrapper = wrapper
        self._replicates = replicates
        self._averaging = Averaging()

    def make(self, model: nn.Module) -> None:
        """Make the modules of a model units that the policy chooses, and then the model itself."""
        units = find_units(model, self._wrap)
        self.make_of(model, [unit for _, unit in units], whole_parameters(model, units))

    def make_of(self, model: nn.Module, units: Sequence[nn.Module], whole: set[nn.Parameter]) -> None:
        """Make known modules of a model units.

        Args:
            model: The model.
            units: The modules.
            whole: The parameters that no unit takes.
        """
        # The module that users call; the parts of a model without a forward are called like roots.
        roots = {id(model), *(id(part) for _, part in parts_of(model))}
        make_root(model)
        for module in (*sorted(units, key=size_of), model):
            make_shardable(module, self._replicates)
            self._wrapper(module, id(module) in roots, whole)

    def complete(self, model: nn.Module, group: Any, device: torch.device) -> None:
        """Average the gradients of parameters that every rank keeps whole, and let units be copied.

        Args:
            model: The model, with values in all its tensors.
            group: The process group whose ranks split the data.
            device: The device that keeps the parameters.
        """
        self._averaging.add(model, (parameter for parameter in model.parameters() if not is_sharded(parameter)), group)

        def completed(copy: nn.Module) -> None:
            self.complete(copy, group, device)

        for gathering in gatherings_in(model):
            for unit in gathering.units.values():
                vars(unit)["__deepcopy__"] = ShardedCopy(unit, self.make_of, completed, device)

    @contextmanager
    def no_backward_sync(self, module: nn.Module) -> Iterator[None]:
        """Accumulate gradients; meanwhile every rank keeps them whole."""
        module.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            with self._averaging.paused(module):
                yield
        finally:
            module.set_requires_gradient_sync(True)  # type: ignore[operator]
