"""The CPU as a kind of device: always present, without streams and without a use for pinned memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from nucleate.devices.hooks import DeviceHooks


class CPUHooks(DeviceHooks):
    """The hooks of the CPU."""

    def is_present(self, device: torch.device) -> bool:
        """Return True."""
        return True

    def is_initialized(self, device_type: str) -> bool:
        """Return True."""
        return True

    def current_index(self, device_type: str) -> int:
        """Return 0: there is one CPU."""
        return 0

    def made_current(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a context that does nothing."""
        return nullcontext()

    def default_generator(self, device: torch.device) -> torch.Generator:
        """Return torch's default generator."""
        return torch.default_generator

    def random_state_of(self, device: torch.device) -> Tensor | None:
        """Return None: the state of the CPU's generator is saved separately from those of devices."""
        return None

    @property
    def pins_memory(self) -> bool:
        """False: the CPU works on host memory directly."""
        return False

    def supports_bfloat16(self, device: torch.device) -> bool:
        """Return True: torch computes in bfloat16 on every CPU."""
        return True

    def describe(self, device: torch.device) -> str:
        """Return the name of the instruction set that torch uses."""
        return torch.backends.cpu.get_cpu_capability()
