"""The base class of strategies: the layout of a model over ranks, and its effect on backward."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import ClassVar

import torch
from torch import Tensor, nn

from nucleate.cluster.environment import Environment
from nucleate.plugin import Plugin


class Strategy(Plugin):
    """A plugin that decides how a model is laid out over the ranks.

    Required: the contract's two methods. `setup(model)` receives the model, deferred or real, after accelerator and
    precision have been applied. It returns the module whose forward the user calls, with all tensors materialized
    (`nucleate.materialize`). Everything else has a working default.

    Attributes:
        device: This process's device, set by `connect`.
        environment: The rank of this process and the world size, set by `connect`.
        timeout: The time that a collective waits for the other ranks before it fails.
    """

    kind: ClassVar[str] = "strategy"
    #: Whether the strategy spans several processes, and so needs a process group.
    distributed: ClassVar[bool] = False
    #: Whether a model of `init_module()` without `empty_init` stays deferred until `setup`: True if no rank should hold
    #: the whole model.
    shards: ClassVar[bool] = False

    device: torch.device = torch.device("cpu")
    environment: Environment = Environment()
    timeout: timedelta = timedelta(minutes=10)

    def connect(self, device: torch.device, environment: Environment) -> None:
        """Store the device and the rank of this process. The process group has started before this call."""
        self.device = device
        self.environment = environment

    @abstractmethod
    def module_init_context(self) -> AbstractContextManager[object]:
        """Return the context in which a model is constructed for this strategy."""

    @abstractmethod
    def setup(self, model: nn.Module) -> nn.Module:
        """Lay the model out, materialize its deferred tensors, and return the module to call."""

    @property
    def data_parallel_size(self) -> int:
        """The number of ranks that split the data."""
        return self.environment.world_size if self.distributed else 1

    @property
    def data_parallel_rank(self) -> int:
        """The number of this rank's part of the data."""
        return self.environment.global_rank if self.distributed else 0

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`."""
        loss.backward()

    def no_backward_sync(self, module: nn.Module) -> AbstractContextManager[object]:
        """Return a context in which backward accumulates gradients without exchanging them.

        Args:
            module: The module that `setup` returned.
        """
        return nullcontext()

    def mark_forward_method(self, module: nn.Module, name: str) -> None:
        """Make the method `name` go through this strategy as forward does.

        Args:
            module: The module that `setup` returned.
            name: The name of a method of the user's model.
        """

    def guards_methods(self, module: nn.Module) -> bool:
        """Return whether a method that calls forward itself would bypass this strategy."""
        return False
