"""The built-in dimensions, by the suite that plugins inherit; test_conformance.py runs it on ranks."""

from nucleate.dimensions import ActivationCheckpointing, Dimension, FullyShard, Replicate, TensorParallel
from nucleate.testing import DimensionSuite, TinyGPT
from tests.device import accelerator


class TestTensorParallel(DimensionSuite):
    accelerator = accelerator()

    def make_dimension(self) -> Dimension:
        return TensorParallel(TinyGPT.plan)


class TestFullyShard(DimensionSuite):
    accelerator = accelerator()

    def make_dimension(self) -> Dimension:
        return FullyShard()


class TestReplicate(DimensionSuite):
    accelerator = accelerator()

    def make_dimension(self) -> Dimension:
        return Replicate()


class TestActivationCheckpointing(DimensionSuite):
    accelerator = accelerator()

    def make_dimension(self) -> Dimension:
        return ActivationCheckpointing()
