"""The device of a rank. In a rank, to import it is to take that device, where factories make tensors from then on.

Each script imports it before it makes a tensor: a device must be there before the first backward pass.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch

from nucleate.accelerators.choice import choose
from nucleate.cluster import Communicator, Environment, process_group
from tests.device import ACCELERATOR, ON_CPU, accelerator, device, equal

__all__ = ["ACCELERATOR", "ON_CPU", "accelerator", "device", "equal", "start_group"]


def start_group() -> Communicator:
    """Start the process group of the ranks, each on its device, and return the communicator."""
    environment = Environment.detect()
    process_group.start(environment, choose(accelerator()).backend, timedelta(seconds=60), device())
    return Communicator(environment, device())


def _take() -> None:
    if ACCELERATOR == "sim":
        from tests.sim.device import install

        install().set_late(True)
    choose(accelerator()).select(int(os.environ["LOCAL_RANK"]))
    torch.set_default_device(device())


if "RANK" in os.environ and not ON_CPU:
    _take()
