"""Strategies: layouts of a model over ranks. A new one implements `Strategy`, under `nucleate.strategies`."""

from nucleate.dimensions.module_policy import declare_units
from nucleate.strategies.base import Strategy
from nucleate.strategies.ddp import DDPStrategy
from nucleate.strategies.fsdp import FSDPStrategy
from nucleate.strategies.model_parallel import ModelParallelStrategy
from nucleate.strategies.parallel import Parallel
from nucleate.strategies.single_device import SingleDeviceStrategy

__all__ = [
    "DDPStrategy",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "Parallel",
    "SingleDeviceStrategy",
    "Strategy",
    "declare_units",
]
