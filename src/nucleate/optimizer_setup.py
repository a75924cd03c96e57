"""The setup of optimizers whose models are set up already, on all ranks alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer

from nucleate.callbacks import Callbacks
from nucleate.cluster.communicator import Communicator
from nucleate.composition import Components
from nucleate.errors import UsageError
from nucleate.layout import LiveLayout
from nucleate.wrappers.accumulation import Accumulation
from nucleate.wrappers.free_parameters import FreeParameters, known_ids
from nucleate.wrappers.optimizer import OptimizerWrapper, RuntimeLinks
from nucleate.wrappers.termination import Termination


class OptimizerSetup:
    """The setup of the optimizers of one runtime.

    Args:
        parts: The plugins, and the place of this process.
        communicator: The communicator of this process.
        models: All models that were set up, without shells.
        accumulation: Lets optimizers wait for the last micro-batch of a step.
        free: The parameters of optimizers that no model has.
        callbacks: Are called after each step.
        termination: Is told about each step.
    """

    def __init__(
        self,
        parts: Components,
        communicator: Communicator,
        models: WeakSet[nn.Module],
        accumulation: Accumulation,
        free: FreeParameters,
        callbacks: Callbacks,
        termination: Termination,
    ) -> None:
        self._precision, self._strategy = parts.precision, parts.strategy
        self._communicator = communicator
        self._models = models
        self._free = free
        self._links = RuntimeLinks(self._free_among, accumulation, free, callbacks, termination)

    def run(self, optimizers: Sequence[Optimizer]) -> tuple[OptimizerWrapper, ...]:
        """Set optimizers up; see `Runtime.setup_optimizers`. Every rank calls this method.

        Args:
            optimizers: The optimizers.
        """
        with self._communicator.all_or_none("setup_optimizers"):
            for model in self._models:
                LiveLayout.of(model).check()
            found = [self._check(optimizer) for optimizer in optimizers]
        self._free.agree(found)
        for optimizer, free in zip(optimizers, found, strict=True):
            self._strategy.setup_optimizer(optimizer)
            self._free.add(optimizer, free)
        return tuple(map(self.wrapped, optimizers))

    def wrapped(self, optimizer: Optimizer) -> OptimizerWrapper:
        """Return the wrapper of an optimizer that is set up.

        Args:
            optimizer: The user's optimizer.
        """
        return OptimizerWrapper(optimizer, self._precision, self._strategy, self._links)

    def _check(self, optimizer: Optimizer) -> list[Tensor]:
        """Refuse an optimizer that cannot be wrapped, and return its parameters that no model has."""
        if isinstance(optimizer, OptimizerWrapper):
            raise UsageError("this optimizer has been set up already; use the optimizer that was returned then.")
        if not isinstance(optimizer, Optimizer):
            raise UsageError(f"setup_optimizers takes torch.optim.Optimizers; got {type(optimizer).__name__}.")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found = self._free.find(optimizer, parameters, known_ids(self._models))
        self._strategy.check_optimizer(optimizer)
        return found

    def _free_among(self, optimizer: Optimizer, parameters: Iterable[Any]) -> list[Tensor]:
        """Return the parameters that no model has, on which all ranks agree; see `FreeParameters.find`."""
        with self._communicator.all_or_none("adding parameters to an optimizer"):
            found = self._free.find(optimizer, parameters, known_ids(self._models))
        self._free.agree([found])
        return found
