"""The strategies that span processes, by the suite that plugins inherit; test_conformance.py runs it on ranks."""

from nucleate.strategies import DDPStrategy, FSDPStrategy
from nucleate.strategies.base import Strategy
from nucleate.testing import StrategySuite
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
