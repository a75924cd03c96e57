"""The strategies that span processes, by the suite that plugins inherit; test_conformance.py runs it on ranks."""

from nucleate.dimensions import Dimension, FullyShard, TensorParallel
from nucleate.strategies import DDPStrategy, FSDPStrategy, Parallel
from nucleate.strategies.base import Strategy
from nucleate.testing import StrategySuite, TinyGPT
from tests.device import accelerator


class TestDDP(StrategySuite):
    accelerator = accelerator()

    def make_strategy(self) -> Strategy:
        return DDPStrategy()


class TestFSDP(StrategySuite):
    accelerator = accelerator()

    def make_strategy(self) -> Strategy:
        return FSDPStrategy()


class TestHSDP(StrategySuite):
    accelerator = accelerator()

    def make_strategy(self) -> Strategy:
        return FSDPStrategy(num_replicas=2)


class TestTensorParallel(StrategySuite):
    accelerator = accelerator()
    models = (TinyGPT,)

    def make_strategy(self) -> Strategy:
        return Parallel(mesh={"tp": -1}, dimensions=[TensorParallel(TinyGPT.plan)])


class Test2D(StrategySuite):
    accelerator = accelerator()
    models = (TinyGPT,)

    def make_strategy(self) -> Strategy:
        dimensions: list[Dimension] = [FullyShard(), TensorParallel(TinyGPT.plan)]
        return Parallel(mesh={"dp_shard": -1, "tp": 2}, dimensions=dimensions)
