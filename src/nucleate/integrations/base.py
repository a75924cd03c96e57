"""What an integration is: the part of `Runtime` that knows one library which constructs, loads or runs models.

Accelerators, precisions and strategies know torch only. A library on top of it may construct on the meta device, load
weights in its own constructor functions or cut its models its own way; an integration tells it, for as long as a model
is constructed, what a `Runtime` would have, and tells the `Runtime` what the library knows about its models.
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
    """How models of one library are constructed and set up.

    It is registered under the name of the library's top-level module, and is active in a `Runtime` if that module has
    been imported when a model is constructed or set up, or if `Runtime(plugins=...)` names it.

    Required: the contract's two methods. `module_init_context()` is entered innermost of all, when whatever is made is
    deferred already if it shall be (`nucleate.deferred.is_recording`); what it patches is as it was when it ends.
    `setup(model)` gets every model, also those that are none of the library's, before anything else is done to it.

    Attributes:
        device: This process's device, set by `connect`.
        environment: Which process this is, of how many, set by `connect`.
    """

    kind: ClassVar[str] = "integration"

    device: torch.device = torch.device("cpu")
    environment: Environment = Environment()

    def connect(self, device: torch.device, environment: Environment) -> None:
        """Learn the device and the place of this process; the process group is up when this is called."""
        self.device = device
        self.environment = environment

    @abstractmethod
    def module_init_context(self) -> AbstractContextManager[object]:
        """Return the context in which the library's models are constructed."""

    @abstractmethod
    def setup(self, model: nn.Module) -> nn.Module:
        """Tell what the library knows about a model; it returns the model itself, deferred or real as it was."""

    def inference_methods(self, model: nn.Module) -> Iterable[str]:
        """Return names of methods that call forward and need no gradients, such as one that generates text.

        They go through the precision as forward does, and a strategy gathers what they need. Every rank must call them
        where it shards.

        Args:
            model: A model that is being set up.
        """
        return ()
