"""Where the tests run: on the CPU, or on the device that `NUCLEATE_TEST_DEVICE` names, such as `sim`.

With another device the same tests compare with what eager torch makes there.
"""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from nucleate.accelerators import Accelerator

#: The name of the accelerator, which is the type of its device.
ACCELERATOR = os.environ.get("NUCLEATE_TEST_DEVICE", "cpu")
ON_CPU = ACCELERATOR == "cpu"
#: Whether this machine has a device of torch's own kinds.
HAS_DEVICE = torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available()


def cpu_only(reason: str) -> pytest.MarkDecorator:
    """Return the mark of tests that say something of the CPU alone, with the reason."""
    return pytest.mark.skipif(not ON_CPU, reason=f"on the CPU only: {reason}")


def device() -> torch.device:
    """Return the device of this process."""
    return torch.device("cpu") if ON_CPU else torch.device(ACCELERATOR, torch.accelerator.current_device_index())


@functools.cache
def lstm_runs_in(dtype: torch.dtype) -> bool:
    """Return whether torch has an LSTM in a half dtype here: oneDNN's needs a CPU with instructions for the dtype."""
    with on_device(), torch.autocast(device().type, dtype):
        try:
            torch.nn.LSTM(2, 2)(torch.ones(1, 2))
        except RuntimeError:
            return False
    return True


def on_device() -> AbstractContextManager[Any]:
    """Return the context in which factories make tensors on the device."""
    return nullcontext() if ON_CPU else device()


def accelerator() -> str | Accelerator:
    """Return the accelerator of a rank for `Runtime`; ranks share the devices where there are more ranks."""
    if ACCELERATOR != "sim":
        return ACCELERATOR
    from tests.sim.shared import SharedDevices

    return SharedDevices()


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two tensors have the same values, wherever they are: what has no target is read to the CPU."""
    return torch.equal(left.cpu(), right.cpu())
