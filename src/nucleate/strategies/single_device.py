"""The strategy for one process and one device, which leaves the model as it is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from nucleate.dimensions.checkpointing import ActivationCheckpointing
from nucleate.dimensions.module_policy import ModulePolicy
from nucleate.errors import ConfigurationError
from nucleate.layout import Mesh
from nucleate.strategies.base import Strategy

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nucleate.cluster.environment import Environment
    from nucleate.plugin import Composition


class SingleDeviceStrategy(Strategy):
    """A strategy that runs the model on the device of the only process.

    Args:
        activation_checkpointing_policy: The modules whose activations are computed a second time in backward instead
            of kept: `"auto"` finds repeated blocks; or classes of modules; or a function of a module's name and the
            module; or a policy of torch.distributed.fsdp.wrap.

    Raises:
        ConfigurationError: The policy is not valid.
    """

    name = "single_device"

    def __init__(self, *, activation_checkpointing_policy: ModulePolicy | None = None) -> None:
        policy = activation_checkpointing_policy
        self._checkpointing = None if policy is None else ActivationCheckpointing(policy)

    def connect(self, device: torch.device, environment: Environment) -> None:
        """Store the device and the rank of this process."""
        super().connect(device, environment)
        if self._checkpointing is not None:
            self._checkpointing.connect(device, Mesh((), ()))

    def check(self, composition: Composition) -> None:
        """Refuse to run in several processes, because each would train its own model.

        Raises:
            ConfigurationError: There is more than one process.
        """
        environment = composition.environment
        if environment.is_planned:
            raise ConfigurationError(
                f"strategy 'single_device' runs in one process, but `devices` asks for {environment.world_size}. Use "
                "strategy='ddp' or 'fsdp', or devices=1."
            )
        if environment.world_size > 1:
            raise ConfigurationError(
                f"strategy 'single_device' runs in one process, but {environment.launcher} started "
                f"{environment.world_size}. Use strategy='ddp' or 'fsdp', or start the script with plain python."
            )

    def module_init_context(self) -> AbstractContextManager[object]:
        """Return an empty context: construction needs nothing special."""
        return nullcontext()

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that the policy of activation checkpointing does not fit."""
        if self._checkpointing is not None:
            self._checkpointing.check_model(model, Mesh((), ()))

    def lay_out(self, model: nn.Module) -> None:
        """Let the chosen modules compute their activations twice. No tensor changes."""
        if self._checkpointing is not None:
            self._checkpointing.apply(model)
