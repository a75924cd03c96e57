"""The strategy for one process and one device, which leaves the model as it is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from nucleate.errors import ConfigurationError
from nucleate.strategies.base import Strategy
from nucleate.strategies.module_policy import ModulePolicy, check_policy

if TYPE_CHECKING:
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
        if activation_checkpointing_policy is not None:
            check_policy(activation_checkpointing_policy, "activation_checkpointing_policy")
        self.activation_checkpointing_policy = activation_checkpointing_policy

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
