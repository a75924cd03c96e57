"""Every built-in accelerator passes the suite that plugins inherit."""

import pytest

from nucleate.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator
from nucleate.testing import AcceleratorSuite


class TestCPU(AcceleratorSuite):
    def make_accelerator(self) -> Accelerator:
        return CPUAccelerator()


class TestCUDAWithoutADevice:
    """What the suite asks of an accelerator where there is no such device runs everywhere."""

    test_being_absent = AcceleratorSuite.test_being_absent_is_an_answer_and_not_an_error

    @pytest.fixture
    def accelerator(self) -> Accelerator:
        return CUDAAccelerator()
