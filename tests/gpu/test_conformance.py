"""The conformance suites on a CUDA device."""

import pytest

from nucleate.accelerators import Accelerator, CUDAAccelerator
from nucleate.precision import FullPrecision, HalfPrecision, MixedPrecision, Precision
from nucleate.strategies import DDPStrategy, FSDPStrategy
from nucleate.strategies.base import Strategy
from nucleate.strategies.single_device import SingleDeviceStrategy
from nucleate.testing import AcceleratorSuite, PrecisionSuite, StrategySuite

pytestmark = pytest.mark.cuda


class TestCUDA(AcceleratorSuite):
    def make_accelerator(self) -> Accelerator:
        return CUDAAccelerator()


class Test32True(PrecisionSuite):
    accelerator = "cuda"

    def make_precision(self) -> Precision:
        return FullPrecision.from_name("32-true")


class Test64True(PrecisionSuite):
    accelerator = "cuda"

    def make_precision(self) -> Precision:
        return FullPrecision.from_name("64-true")


class TestBF16True(PrecisionSuite):
    accelerator = "cuda"

    def make_precision(self) -> Precision:
        return HalfPrecision.from_name("bf16-true")


class Test16True(PrecisionSuite):
    accelerator = "cuda"

    def make_precision(self) -> Precision:
        return HalfPrecision.from_name("16-true")


class TestBF16Mixed(PrecisionSuite):
    accelerator = "cuda"

    def make_precision(self) -> Precision:
        return MixedPrecision.from_name("bf16-mixed")


class Test16Mixed(PrecisionSuite):
    accelerator = "cuda"

    def make_precision(self) -> Precision:
        return MixedPrecision.from_name("16-mixed")


class TestSingleDevice(StrategySuite):
    accelerator = "cuda"

    def make_strategy(self) -> Strategy:
        return SingleDeviceStrategy()


class TestDDP(StrategySuite):
    accelerator = "cuda"

    def make_strategy(self) -> Strategy:
        return DDPStrategy()


class TestFSDP(StrategySuite):
    accelerator = "cuda"

    def make_strategy(self) -> Strategy:
        return FSDPStrategy()
