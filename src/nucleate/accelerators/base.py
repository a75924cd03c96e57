"""What an accelerator is: a kind of device, the backend its processes talk over, and this process's device."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import nn

from nucleate.devices import DeviceHooks
from nucleate.plugin import Plugin


class Accelerator(Plugin, DeviceHooks):
    """A kind of device.

    Required: the contract's two methods, `is_available`, `count` and `select`. Everything else has a
    working default. That holds for `DeviceHooks`, too: its methods say how this kind of device draws random numbers,
    pins memory and the like, and are right for every device that `torch.accelerator` serves. `TorchAccelerator` is such
    an accelerator; a class of your own is needed only where a kind of device differs from it.
    """

    kind: ClassVar[str] = "accelerator"

    @property
    def backend(self) -> str:
        """The torch.distributed backend of its processes, such as `"gloo"`; a subclass may set a class attribute."""
        return "gloo"

    @abstractmethod
    def is_available(self) -> bool:
        """Return whether this machine has such a device and this torch can use it."""

    def why_absent(self) -> str:
        """Return why `is_available` says no and what to do, as the rest of a sentence after "but"."""
        return f"this machine has none that this torch ({torch.__version__}) can use: install a torch build for it"

    @abstractmethod
    def count(self) -> int:
        """Return how many processes of one node can have a device each."""

    @abstractmethod
    def select(self, local_rank: int) -> torch.device:
        """Take the device of the process with this rank on its node, make it current, and return it.

        Raises:
            ConfigurationError: There are fewer devices than `local_rank` needs.
        """

    @abstractmethod
    def module_init_context(self) -> AbstractContextManager[object]:
        """Return the context in which factories place new tensors on the selected device."""

    @abstractmethod
    def setup(self, model: nn.Module) -> nn.Module:
        """Move what is real in `model` to the selected device, in place; leave deferred tensors alone."""

    def peak_memory_bytes(self) -> int | None:
        """Return the most device memory this process has held, or None where the device does not count it."""
        return None

    def random_state(self) -> torch.Tensor | None:
        """Return the state of the device's own generator, or None where it has none of its own."""
        return None

    def set_random_state(self, state: torch.Tensor) -> None:
        """Restore what `random_state` returned."""
