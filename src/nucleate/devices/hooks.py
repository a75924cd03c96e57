"""The functions that depend on the kind of a device, by `torch.accelerator` and the device's own torch module."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nucleate.devices.generators import Generator, ModuleGenerator
from nucleate.devices.kinds import current_accelerator


class DeviceHooks:
    """The functions that depend on the kind of a device.

    The methods here are right for every device that torch.accelerator serves. The subclass for another kind overrides
    them. Every `device` argument has an index.
    """

    def module(self, device: torch.device) -> Any:
        """Return torch's module of this kind of device, such as `torch.xpu`."""
        return torch.get_device_module(device)

    def is_present(self, device: torch.device) -> bool:
        """Return whether this process can use the device: torch was built for it, and the machine has it."""
        try:
            count = self.module(device).device_count()
        except (AttributeError, RuntimeError):
            return False
        return (device.index or 0) < int(count)

    def is_initialized(self, device_type: str) -> bool:
        """Return whether this process has begun to use devices of this kind. This method does not initialize a device.

        Where torch's module has no such function, a present device counts as used.
        """
        here = torch.device(device_type, 0)
        try:
            asked = getattr(self.module(here), "is_initialized", None)
        except (AttributeError, RuntimeError):
            return False
        return self.is_present(here) if asked is None else bool(asked())

    def current_index(self, device_type: str) -> int:
        """Return the index of the current device of this kind, or 0 without a device of this kind."""
        here = torch.device(device_type, 0)
        if not self.is_present(here):
            return 0
        # `torch.mps` has one device and no such function (torch/mps/__init__.py, 2.13).
        current_device = getattr(self.module(here), "current_device", None)
        if current_device is not None:
            return int(current_device())
        accelerator = torch.accelerator.current_accelerator()
        is_current = accelerator is not None and accelerator.type == device_type
        return torch.accelerator.current_device_index() if is_current else 0

    def made_current(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context in which the device is the current one of its kind."""
        return torch.accelerator.device_index(device.index)

    # -- random numbers ------------------------------------------------------------------------------------

    def default_generator(self, device: torch.device) -> Generator:
        """Return the generator that factories and in-place fills on the device use by default."""
        generators = getattr(self.module(device), "default_generators", ())
        # torch itself needs only a module's functions for states (torch/random.py, `fork_rng`).
        return generators[device.index] if generators else ModuleGenerator(device)

    def fill_distance(self, is_normal: bool, numel: int, dtype: torch.dtype, device: torch.device) -> int | None:
        """Return the distance by which a random fill moves the generator, or None if only running the fill shows it.

        Args:
            is_normal: Whether the fill is `normal_`; else it is `uniform_`.
            numel: The number of elements.
            dtype: The dtype of the elements.
            device: The device.
        """
        return None

    def moved(self, state: Tensor, distance: int) -> Tensor:
        """Return a generator's state, moved forward by a distance that `fill_distance` returned."""
        raise NotImplementedError(f"{type(self).__name__} returns distances but does not move a state by them")

    def random_state_of(self, device: torch.device) -> Tensor | None:
        """Return the state of the device's own generator, or None where nothing has used the device yet."""
        if not self.is_initialized(device.type) or not self.is_present(device):
            return None
        return self.default_generator(device).get_state()

    # -- copies --------------------------------------------------------------------------------------------

    @property
    def pins_memory(self) -> bool:
        """Whether copies from pinned host memory can overlap with work on the device: torch pins memory for it."""
        accelerator = current_accelerator()
        return accelerator is not None and _torch_pins_memory(accelerator)

    def make_stream(self, device: torch.device) -> torch.Stream:
        """Return a new stream of the device."""
        return torch.Stream(device=device)

    def current_stream(self, device: torch.device) -> torch.Stream:
        """Return the stream that receives work for the device."""
        return torch.accelerator.current_stream(device)

    def make_event(self, device: torch.device) -> torch.Event:
        """Return a new event of the device."""
        return torch.Event(device=device)

    # -- arithmetic ----------------------------------------------------------------------------------------

    def supports_bfloat16(self, device: torch.device) -> bool:
        """Return whether the device computes in bfloat16."""
        asked = getattr(self.module(device), "is_bf16_supported", None)
        return True if asked is None else bool(asked())

    def peak_flops(self, device: torch.device, dtype: torch.dtype) -> float | None:
        """Return how many floating point operations the device can do in a second, or None where it is not known.

        Args:
            device: The device.
            dtype: The dtype of the computation.
        """
        return None

    def describe(self, device: torch.device) -> str:
        """Return a text that is equal for devices that compute the same bits."""
        name = getattr(self.module(device), "get_device_name", None)
        return str(name(device.index)) if name is not None else device.type


@functools.cache
def _torch_pins_memory(accelerator: torch.device) -> bool:
    """Pin one byte as a test. Not every kind of device has pinned memory, and torch has no function for it (2.13)."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        try:
            torch.empty(1, dtype=torch.uint8, device="cpu", pin_memory=True)
        except (RuntimeError, NotImplementedError):
            return False
        return True
