"""The device that the tests of this folder run on: CUDA, or the simulated device, which `NUCLEATE_TEST_DEVICE` chooses.

The tests are written for CUDA. On the simulated device the same code runs, so that a fault of the tests shows before
they meet a GPU. What it cannot show has a reason of `REASONS`, and a test checks that the reason is true.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from nucleate.accelerators import Accelerator, CUDAAccelerator, TorchAccelerator
from nucleate.devices import hooks_of

#: The environment variable by which `run_all.py` tells its tests, and these their ranks, which device to use.
VARIABLE = "NUCLEATE_TEST_DEVICE"
#: Device memory beside what is loaded: a staging buffer for what arrives and one for what it is cast to, rounded up.
BUFFER_SLACK = 2 * 32 * 2**20 + 2**20
DEVICE_TYPE = os.environ.get(VARIABLE, "cuda")
#: Whether the simulated device stands in for a GPU.
IS_SIMULATED = DEVICE_TYPE == "sim"

if IS_SIMULATED:
    from tests.sim.device import install

    _sim = install()


def device(index: int = 0) -> torch.device:
    """Return one of the devices."""
    return torch.device(DEVICE_TYPE, index)


def count() -> int:
    """Return how many devices there are."""
    if IS_SIMULATED:
        # While tests are collected it is put away.
        was_available = _sim.available()
        _sim.set_available(True)
        try:
            return torch.accelerator.device_count()
        finally:
            _sim.set_available(was_available)
    return torch.accelerator.device_count() if torch.cuda.is_available() else 0


def make_accelerator(index: int | None = None) -> Accelerator:
    """Return a new accelerator for the devices, or for the one with an index."""
    if DEVICE_TYPE == "cuda":
        return CUDAAccelerator(index=index)
    return TorchAccelerator(DEVICE_TYPE, index=index)


def synchronize() -> None:
    """Wait until the first device has done everything."""
    torch.accelerator.synchronize(device())


def free_bytes(index: int = 0) -> int:
    """Return how much memory of a device can still be taken."""
    gc.collect()
    torch.accelerator.empty_cache()
    return int(torch.accelerator.get_memory_info(index)[0])


class DeviceMemory:
    """Counts what is taken of a device's memory from now on.

    Args:
        index: The device's index.
    """

    def __init__(self, index: int = 0) -> None:
        self._index = index
        gc.collect()
        torch.accelerator.synchronize(device(index))
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(index)
        self._base = torch.accelerator.memory_allocated(index)
        self._base_reserved = torch.accelerator.memory_reserved(index)

    def held_bytes(self) -> int:
        """Return how much more tensors hold now than at first."""
        return int(torch.accelerator.memory_allocated(self._index)) - self._base

    def peak_bytes(self) -> int:
        """Return how much more tensors have held at some moment."""
        return int(torch.accelerator.max_memory_allocated(self._index)) - self._base

    def peak_reserved_bytes(self) -> int:
        """Return how much more torch's allocator has taken from the device at some moment."""
        return int(torch.accelerator.max_memory_reserved(self._index)) - self._base_reserved


# -- what the simulated device cannot show -------------------------------------------------------------------


@dataclass(frozen=True)
class Reason:
    """Why a test is skipped on the simulated device.

    Attributes:
        text: What the report says.
        is_true: Tries on the simulated device that the text is true.
    """

    text: str
    is_true: Callable[[], bool]


def _has_no_philox() -> bool:
    return hooks_of(device()).fill_distance(True, 1000, torch.float32, device()) is None


def _does_nothing_beside_the_host() -> bool:
    source = torch.ones(1 << 20, pin_memory=True)
    target = torch.zeros(1 << 20, device=device())
    synchronize()
    target.copy_(source, non_blocking=True)
    event = torch.Event(device=device())
    event.record(torch.accelerator.current_stream(device()))
    time.sleep(0.05)
    was_done = bool(event.query())
    synchronize()
    return not was_done


def _has_no_caching_allocator() -> bool:
    # torch's allocator for CUDA keeps what is freed.
    memory = DeviceMemory()
    tensor = torch.zeros(1 << 22, device=device())
    del tensor
    return torch.accelerator.memory_reserved(0) - memory._base_reserved < 1 << 22


REASONS = {
    "philox": Reason("the simulated device has no Philox generator", _has_no_philox),
    "overlap": Reason("the simulated device does nothing while the host works", _does_nothing_beside_the_host),
    "sizes": Reason("the simulated device has host memory and no caching allocator", _has_no_caching_allocator),
    "kernels": Reason("there are no CUDA kernels here", lambda: not torch.cuda.is_available()),
}


def only_on_gpu(reason: str) -> pytest.MarkDecorator:
    """Skip a test on the simulated device, for one of `REASONS`."""
    return pytest.mark.only_on_gpu(reason)
