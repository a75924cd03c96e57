"""Every built-in strategy passes the suite that plugins inherit; on several ranks in tests/multi/conformance.py."""

from nucleate.strategies import DDPStrategy, FSDPStrategy
from nucleate.strategies.base import Strategy
from nucleate.strategies.single_device import SingleDeviceStrategy
from nucleate.testing import StrategySuite
from tests.device import ACCELERATOR


class TestSingleDevice(StrategySuite):
    accelerator = ACCELERATOR

    def make_strategy(self) -> Strategy:
        return SingleDeviceStrategy()


class TestDDP(StrategySuite):
    accelerator = ACCELERATOR

    def make_strategy(self) -> Strategy:
        return DDPStrategy()


class TestFSDP(StrategySuite):
    accelerator = ACCELERATOR

    def make_strategy(self) -> Strategy:
        return FSDPStrategy()
