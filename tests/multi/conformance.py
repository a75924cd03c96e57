"""The strategies that span processes, by the suite that plugins inherit; test_conformance.py runs it on ranks."""

from nucleate.strategies.base import Strategy
from nucleate.strategies.ddp import DDPStrategy
from nucleate.strategies.fsdp import FSDPStrategy
from nucleate.testing import StrategySuite


class TestDDP(StrategySuite):
    def make_strategy(self) -> Strategy:
        return DDPStrategy()


class TestFSDP(StrategySuite):
    def make_strategy(self) -> Strategy:
        return FSDPStrategy()


class TestHSDP(StrategySuite):
    def make_strategy(self) -> Strategy:
        return FSDPStrategy(num_replicas=2)
