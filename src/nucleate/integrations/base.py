"""The base class of integrations: the part of `Runtime` that knows one library of models.

Accelerators, precisions and strategies know only torch. A library on top of torch may construct on the meta device,
load weights in its own constructor functions, or split its models in its own way. While a model is constructed, an
integration makes the library follow the `Runtime`. It also gives the `Runtime` the library's facts about its models.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import nn

from nucleate.cluster.environment import Environment
from nucleate.plugin import Plugin


class Integration(Plugin):
    """A plugin that constructs and sets up the models of one library.

    It is registered under the name of the library's top-level module. It is active in a `Runtime` if that module has
    been imported when a model is constructed or set up, or if `Runtime(plugins=...)` names it.

    Required: the contract's two methods. `module_init_context()` is the innermost context: deferral, if any, is already
    active (`nucleate.deferred.is_recording`). It must undo its patches when it ends. `setup(model)` receives every
    model first, including models of other libraries.

    Attributes:
        device: This process's device, set by `connect`.
        environment: The rank of this process and the world size, set by `connect`.
    """

    kind: ClassVar[str] = "integration"

    device: torch.device = torch.device("cpu")
    environment: Environment = Environment()

    def connect(self, device: torch.device, environment: Environment) -> None:
        """Store the device and the rank of this process. The process group has started before this call."""
        self.device = device
        self.environment = environment

    @abstractmethod
    def module_init_context(self) -> AbstractContextManager[object]:
        """Return the context in which the library's models are constructed."""

    @abstractmethod
    def setup(self, model: nn.Module) -> nn.Module:
        """Add the library's knowledge to a model, and return the same model, still deferred or real as before."""

    def inference_methods(self, model: nn.Module) -> Iterable[str]:
        """Return names of methods that call forward and need no gradients, such as one that generates text.

        These methods go through the precision as forward does, and the strategy gathers the parameters for them. If
        the strategy shards, every rank must call them.

        Args:
            model: A model that is being set up.
        """
        return ()
