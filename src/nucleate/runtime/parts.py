"""The parts of a runtime: its plugins, the place of this process, and the objects that its methods share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import nn

from nucleate.accelerators.base import Accelerator
from nucleate.callbacks import Callbacks
from nucleate.cluster.communicator import Communicator
from nucleate.cluster.environment import Environment
from nucleate.composition import Components
from nucleate.integrations.active import Integrations
from nucleate.optimizer_setup import OptimizerSetup
from nucleate.plugin_choices import PluginChoices
from nucleate.precision.base import Precision
from nucleate.strategies.base import Strategy
from nucleate.wrappers.accumulation import Accumulation
from nucleate.wrappers.deliveries import Deliveries
from nucleate.wrappers.free_parameters import FreeParameters
from nucleate.wrappers.termination import Termination

if TYPE_CHECKING:
    from nucleate.loggers.group import LoggerGroup


class Parts:
    """The base of all groups of methods of a `Runtime`, whose constructor sets these attributes."""

    _settings: dict[str, Any]
    _accelerator: Accelerator
    _precision: Precision
    _strategy: Strategy
    _environment: Environment
    _device: torch.device
    _parts: Components
    _plugins: PluginChoices
    _communicator: Communicator
    _integrations: Integrations
    _callbacks: Callbacks
    _loggers: LoggerGroup | None
    _verify: bool | str
    # The models that were set up, without shells.
    _models: WeakSet[nn.Module]
    _free: FreeParameters
    _optimizer_setup: OptimizerSetup
    _deliveries: Deliveries
    _accumulation: Accumulation
    _termination: Termination
    _launched: bool

    def launch(self) -> None:
        """Start the process group; see `Building.launch`."""
        raise NotImplementedError

    def _renew(self) -> None:
        """Make this runtime, which another process has made, one of this process."""
        raise NotImplementedError

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator plugin."""
        return self._accelerator

    @property
    def precision(self) -> Precision:
        """The precision plugin."""
        return self._precision

    @property
    def strategy(self) -> Strategy:
        """The strategy plugin."""
        return self._strategy

    @property
    def callbacks(self) -> list[Any]:
        """The callbacks, in the order in which `call` calls them. The list is a copy."""
        return list(self._callbacks)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._device

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self._environment.world_size

    @property
    def global_rank(self) -> int:
        """The rank of this process."""
        return self._environment.global_rank

    @property
    def local_rank(self) -> int:
        """The number of this process among the processes of its node."""
        return self._environment.local_rank

    @property
    def node_rank(self) -> int:
        """The number of this node among all nodes."""
        return self._environment.node_rank

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is rank 0, which prints and writes."""
        return self._environment.global_rank == 0
