"""The CPU as an accelerator: always available, and shared by any number of processes, which communicate over gloo."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, final

import torch
from torch import nn

from nucleate.accelerators.base import Accelerator
from nucleate.accelerators.placement import place
from nucleate.devices.cpu import CPUHooks

_DEVICE = torch.device("cpu")


@final
class CPUAccelerator(CPUHooks, Accelerator):
    """The accelerator for the CPU."""

    name = "cpu"
    backend: ClassVar[str] = "gloo"
    is_shared: ClassVar[bool] = True

    def is_available(self) -> bool:
        """Return True: there is always a CPU."""
        return True

    def count(self) -> int:
        """Return the number of cores that this process may use. More processes are slow, but work."""
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1

    def select(self, local_rank: int) -> torch.device:
        """Return the CPU, which all processes share."""
        return _DEVICE

    def module_init_context(self) -> AbstractContextManager[object]:
        """Return the context in which factories place new tensors on the CPU."""
        # A device context costs a call per torch function, so it is only entered if it changes the default device.
        return nullcontext() if torch.get_default_device().type == "cpu" else _DEVICE

    def setup(self, model: nn.Module) -> nn.Module:
        """Move the real tensors of `model` to the CPU, in place."""
        return place(model, _DEVICE)
