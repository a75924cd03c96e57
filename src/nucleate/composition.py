"""The parts of a `Runtime`: names become plugins, and plugins that do not work together raise an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import torch

from nucleate.accelerators.base import Accelerator
from nucleate.accelerators.choice import choose
from nucleate.cluster.backends import beside_host, check_backend
from nucleate.cluster.device_request import DeviceRequest
from nucleate.cluster.environment import Environment
from nucleate.devices import take_device
from nucleate.errors import PluginNotFoundError
from nucleate.plugin import Composition
from nucleate.precision.base import Precision
from nucleate.registry import LOGGERS, PRECISIONS
from nucleate.strategies.base import Strategy
from nucleate.strategies.choice import choose as choose_strategy

if TYPE_CHECKING:
    from nucleate.loggers.group import LoggerGroup

#: The precision of a `Runtime` without a choice.
_DEFAULT_PRECISION = "no-cast"
#: Names that scripts written for Lightning Fabric use.
_PRECISION_ALIASES = {
    "32": "32-true",
    "64": "64-true",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
}


@dataclass(frozen=True, slots=True)
class Components:
    """The three plugins of a `Runtime`, and the place of this process.

    Attributes:
        accelerator: The accelerator plugin.
        precision: The precision plugin.
        strategy: The strategy plugin.
        environment: The place of this process among all processes.
        device: The device of this process.
    """

    accelerator: Accelerator
    precision: Precision
    strategy: Strategy
    environment: Environment
    device: torch.device

    @classmethod
    def choose(
        cls,
        accelerator: str | Accelerator | None,
        precision: str | int | Precision | None,
        strategy: str | Strategy | None,
        environment: Environment,
        request: DeviceRequest | None = None,
    ) -> Self:
        """Look names up, and let each plugin check the others.

        Args:
            accelerator: See `Runtime`.
            precision: See `Runtime`.
            strategy: See `Runtime`.
            environment: The place of this process among all processes, as a launcher has set it.
            request: The processes and devices to use; None takes what the launcher started.

        Raises:
            PluginNotFoundError: No plugin of that kind has that name.
            ConfigurationError: A part is missing, or does not work with the others.
        """
        chosen = choose(accelerator)
        request = request or DeviceRequest()
        environment = request.resolve(environment, chosen.count, chosen.is_shared)
        if precision is None:
            precision = _DEFAULT_PRECISION
        if isinstance(precision, (str, int)):
            precision = _PRECISION_ALIASES.get(str(precision), str(precision))
        if str(precision).startswith("transformer-engine") and precision not in PRECISIONS.names():
            raise PluginNotFoundError(
                f"precision={precision!r} needs a plugin for Transformer Engine, which does not exist yet. Use "
                "'bf16-mixed' or 'bf16-true'."
            )
        precision = cast(Precision, PRECISIONS.choose(precision))
        strategy = choose_strategy(strategy, environment.world_size)
        index = request.index(environment.local_rank)
        if environment.is_planned:
            # This process only starts the ranks: a device that it opened would lose memory, and could not be forked.
            device = chosen.device_of(index)
        else:
            device = chosen.select(index)
            take_device(device, chosen)
        parts = cls(chosen, precision, strategy, environment, device)
        for part in (chosen, precision, strategy):
            part.check(parts.shown)
        if strategy.process_group_backend is not None:
            check_backend(parts.backend, device)
        return parts

    @property
    def backend(self) -> str:
        """The torch.distributed backend of the processes: the strategy's own, else the accelerator's."""
        asked = self.strategy.process_group_backend
        return self.accelerator.backend if asked is None else beside_host(asked, self.device)

    @property
    def shown(self) -> Composition:
        """The composition that each plugin checks."""
        return Composition(self.accelerator, self.precision, self.strategy, self.environment, self.device)

    def __str__(self) -> str:
        ranks = f" x {self.environment.world_size}" if self.environment.world_size > 1 else ""
        names = (part.name or type(part).__name__ for part in (self.accelerator, self.strategy, self.precision))
        accelerator, strategy, precision = names
        return f"{accelerator}, {strategy}{ranks}, {precision}"


def choose_loggers(loggers: Any, writes: bool) -> LoggerGroup | None:
    """Look up names of loggers, or return None without a logger.

    Args:
        loggers: See `Runtime`.
        writes: Whether this process writes.

    Raises:
        PluginNotFoundError: No logger has that name.
        ConfigurationError: An object cannot log metrics.
        MissingDependencyError: The package that a logger writes with is not installed.
    """
    if loggers is None or (isinstance(loggers, (list, tuple)) and not loggers):
        return None
    from nucleate.loggers.group import LoggerGroup

    return LoggerGroup(loggers, LOGGERS.create, writes)
