"""The parts of a `Runtime`: names become plugins, and plugins that do not work together raise an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, cast

import torch

from nucleate.accelerators.base import Accelerator
from nucleate.accelerators.choice import choose
from nucleate.cluster.device_request import DeviceRequest
from nucleate.cluster.environment import Environment
from nucleate.devices import take_device
from nucleate.plugin import Composition
from nucleate.precision.base import Precision
from nucleate.registry import PRECISIONS, STRATEGIES
from nucleate.strategies.base import Strategy

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
        accelerator: str | Accelerator,
        precision: str | int | Precision | None,
        strategy: str | Strategy,
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
        if strategy == "auto":
            strategy = "ddp" if environment.world_size > 1 else "single_device"
        if precision is None:
            precision = _DEFAULT_PRECISION
        if isinstance(precision, (str, int)):
            precision = _PRECISION_ALIASES.get(str(precision), str(precision))
        precision = cast(Precision, PRECISIONS.choose(precision))
        strategy = cast(Strategy, STRATEGIES.choose(strategy))
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
        return parts

    @property
    def shown(self) -> Composition:
        """The composition that each plugin checks."""
        return Composition(self.accelerator, self.precision, self.strategy, self.environment, self.device)

    def __str__(self) -> str:
        ranks = f" x {self.environment.world_size}" if self.environment.world_size > 1 else ""
        names = (part.name or type(part).__name__ for part in (self.accelerator, self.strategy, self.precision))
        accelerator, strategy, precision = names
        return f"{accelerator}, {strategy}{ranks}, {precision}"
