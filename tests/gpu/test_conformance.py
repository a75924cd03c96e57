"""The conformance suites on the device. `test_ranks.py` runs those of strategies on two GPUs as well."""

from __future__ import annotations

import pytest

from nucleate.accelerators import Accelerator
from nucleate.precision import FullPrecision, HalfPrecision, MixedPrecision, NoCastPrecision, Precision
from nucleate.strategies import DDPStrategy, FSDPStrategy
from nucleate.strategies.base import Strategy
from nucleate.strategies.single_device import SingleDeviceStrategy
from nucleate.testing import AcceleratorSuite, PrecisionSuite, StrategySuite
from tests.gpu.device import DEVICE_TYPE, make_accelerator

pytestmark = pytest.mark.cuda


class TestAccelerator(AcceleratorSuite):
    """The accelerator suite."""

    def make_accelerator(self) -> Accelerator:
        return make_accelerator()


class TestNoCast(PrecisionSuite):
    """The precision suite with `no-cast`, the default."""

    accelerator = DEVICE_TYPE

    def make_precision(self) -> Precision:
        return NoCastPrecision()


class Test32True(PrecisionSuite):
    """The precision suite with `32-true`."""

    accelerator = DEVICE_TYPE

    def make_precision(self) -> Precision:
        return FullPrecision.from_name("32-true")


class Test64True(PrecisionSuite):
    """The precision suite with `64-true`."""

    accelerator = DEVICE_TYPE

    def make_precision(self) -> Precision:
        return FullPrecision.from_name("64-true")


class TestBF16True(PrecisionSuite):
    """The precision suite with `bf16-true`."""

    accelerator = DEVICE_TYPE

    def make_precision(self) -> Precision:
        return HalfPrecision.from_name("bf16-true")


class Test16True(PrecisionSuite):
    """The precision suite with `16-true`."""

    accelerator = DEVICE_TYPE

    def make_precision(self) -> Precision:
        return HalfPrecision.from_name("16-true")


class TestBF16Mixed(PrecisionSuite):
    """The precision suite with `bf16-mixed`."""

    accelerator = DEVICE_TYPE

    def make_precision(self) -> Precision:
        return MixedPrecision.from_name("bf16-mixed")


class Test16Mixed(PrecisionSuite):
    """The precision suite with `16-mixed`."""

    accelerator = DEVICE_TYPE

    def make_precision(self) -> Precision:
        return MixedPrecision.from_name("16-mixed")


class TestSingleDevice(StrategySuite):
    """The strategy suite on a single device."""

    accelerator = DEVICE_TYPE

    def make_strategy(self) -> Strategy:
        return SingleDeviceStrategy()


class TestDDP(StrategySuite):
    """The strategy suite with DDP."""

    accelerator = DEVICE_TYPE

    def make_strategy(self) -> Strategy:
        return DDPStrategy()


class TestFSDP(StrategySuite):
    """The strategy suite with FSDP."""

    accelerator = DEVICE_TYPE

    def make_strategy(self) -> Strategy:
        return FSDPStrategy()
