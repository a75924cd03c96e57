"""Generators of devices that have no `torch.Generator` object, and of devices that this machine does not have."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class Generator(Protocol):
    """The methods of a generator that a random program needs; `torch.Generator` has them."""

    @property
    def device(self) -> torch.device:
        """The generator's device."""
        ...

    def get_state(self) -> Tensor:
        """Return a copy of the state, on the CPU."""
        ...

    def set_state(self, state: Tensor) -> Any:
        """Set the generator's state."""
        ...

    def manual_seed(self, seed: int) -> Any:
        """Set the generator's state from a seed."""
        ...


class ModuleGenerator:
    """The default generator of a device whose torch module offers only the generator's states.

    Args:
        device: The device, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)
        # `torch.mps` has one device, and its functions do not take it (torch/mps/__init__.py, 2.13).
        takes_device = bool(inspect.signature(self._module.get_rng_state).parameters)
        self._named: tuple[torch.device, ...] = (device,) if takes_device else ()

    def get_state(self) -> Tensor:
        """Return a copy of the state."""
        with _unseen():
            state: Tensor = self._module.get_rng_state(*self._named)
            return state

    def set_state(self, state: Tensor) -> None:
        """Set the generator's state."""
        with _unseen():
            self._module.set_rng_state(state, *self._named)

    def manual_seed(self, seed: int) -> None:
        """Set the generator's state from a seed."""
        with _unseen(), torch.accelerator.device_index(self.device.index):
            self._module.manual_seed(seed)


class AbsentGenerator:
    """The generator of a device that this machine does not have: it keeps states, and nothing draws from it.

    `torch.manual_seed` would seed the device's generator as well, so the state here follows the seed of the CPU's.

    Args:
        device: The device, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seed = torch.initial_seed()
        self._state = _counter_state(self._seed)

    def get_state(self) -> Tensor:
        """Return a copy of the state."""
        if torch.initial_seed() != self._seed:
            self._seed = torch.initial_seed()
            self._state = _counter_state(self._seed)
        with _unseen():
            return self._state.clone()

    def set_state(self, state: Tensor) -> None:
        """Set the generator's state."""
        with _unseen():
            self._state = state.clone()

    def manual_seed(self, seed: int) -> None:
        """Set the generator's state from a seed."""
        self._state = _counter_state(seed)


@contextmanager
def _unseen() -> Iterator[None]:
    """Hide operations on a state from torch's modes."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def _counter_state(seed: int) -> Tensor:
    """Return a seed and an offset of 0, in the form of the states of counter-based device generators."""
    with _unseen():
        words = [seed if seed < 2**63 else seed - 2**64, 0]
        return torch.tensor(words, dtype=torch.int64, device="cpu").view(torch.uint8)
