"""What a strategy is: how one model is laid out over processes, and what that means for backward and clipping."""

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
    """How a model is laid out over the processes.

    Required: the contract's two methods. `setup(model)` receives the model with its accelerator and
    precision already applied, deferred or real, and returns the module whose forward is to be called, with
    every tensor made (`nucleate.materialize`). The rest has a working default.

    Attributes:
        device: This process's device, set by `connect`.
        environment: Which process this is, of how many, set by `connect`.
        timeout: How long a collective waits for the other ranks before it fails.
    """

    kind: ClassVar[str] = "strategy"
    #: Whether it spans processes, and so needs a process group.
    distributed: ClassVar[bool] = False
    #: Whether a model of `init_module()` without `empty_init` stays deferred until `setup`: yes where no rank should
    #: hold all of a model.
    shards: ClassVar[bool] = False

    device: torch.device = torch.device("cpu")
    environment: Environment = Environment()
    timeout: timedelta = timedelta(minutes=10)

    def connect(self, device: torch.device, environment: Environment) -> None:
        """Learn the device and the place of this process; the process group is up when this is called."""
        self.device = device
        self.environment = environment

    @abstractmethod
    def module_init_context(self) -> AbstractContextManager[object]:
        """Return the context in which a model is constructed for this strategy."""

    @abstractmethod
    def setup(self, model: nn.Module) -> nn.Module:
        """Lay the model out, make everything that is deferred, and return the module to call."""

    @property
    def data_parallel_size(self) -> int:
        """Over how many ranks the data is split."""
        return self.environment.world_size if self.distributed else 1

    @property
    def data_parallel_rank(self) -> int:
        """Which part of the data this rank gets."""
        return self.environment.global_rank if self.distributed else 0

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        loss.backward()

    def no_backward_sync(self, module: nn.Module) -> AbstractContextManager[object]:
        """Return a context in which backward accumulates gradients without exchanging them.

        Args:
            module: What `setup` returned.
        """
        return nullcontext()

    def mark_forward_method(self, module: nn.Module, name: str) -> None:
        """Make the method `name` do what this strategy does around forward.

        Args:
            module: What `setup` returned.
            name: A method of the user's model.
        """

    def guards_methods(self, module: nn.Module) -> bool:
        """Return whether a method that calls forward by itself would go around this strategy."""
        return False
