"""Generators of devices. Some devices have no `torch.Generator` object; others are not on this machine."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class Generator(Protocol):
    """What a random program needs of a generator; `torch.Generator` has it."""

    @property
    def device(self) -> torch.device:
        """The generator's device."""
        ...

    def get_state(self) -> Tensor:
        """Return a copy of the state, on the CPU."""
        ...

    def set_state(self, state: Tensor) -> Any:
        """Put the generator into a state."""
        ...

    def manual_seed(self, seed: int) -> Any:
        """Put the generator into the state that a seed stands for."""
        ...


class ModuleGenerator:
    """The default generator of a device, of which torch's module offers the states only.

    Args:
        device: The device, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)
        # `torch.mps` has one device and does not ask for it (torch/mps/__init__.py, 2.13).
        takes_device = bool(inspect.signature(self._module.get_rng_state).parameters)
        self._named: tuple[torch.device, ...] = (device,) if takes_device else ()

    def get_state(self) -> Tensor:
        """Return a copy of the state."""
        with _unseen():
            state: Tensor = self._module.get_rng_state(*self._named)
            return state

    def set_state(self, state: Tensor) -> None:
        """Put the generator into a state."""
        with _unseen():
            self._module.set_rng_state(state, *self._named)

    def manual_seed(self, seed: int) -> None:
        """Put the generator into the state that a seed stands for."""
        with _unseen(), torch.accelerator.device_index(self.device.index):
            self._module.manual_seed(seed)


class AbsentGenerator:
    """Stands for the generator of a device that this machine does not have: it keeps states, and nothing draws from it.

    `torch.manual_seed` would seed the device's generator as well, so its state follows the seed of the CPU's.

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
        """Put the generator into a state."""
        with _unseen():
            self._state = state.clone()

    def manual_seed(self, seed: int) -> None:
        """Put the generator into the state that a seed stands for."""
        self._state = _counter_state(seed)


@contextmanager
def _unseen() -> Iterator[None]:
    """Keep modes of torch from seeing what is done to a state."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def _counter_state(seed: int) -> Tensor:
    """Return a seed and an offset of 0, as the counter-based generators of devices keep them."""
    with _unseen():
        words = [seed if seed < 2**63 else seed - 2**64, 0]
        return torch.tensor(words, dtype=torch.int64, device="cpu").view(torch.uint8)
