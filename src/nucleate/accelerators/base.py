"""The base class of accelerators: a kind of device, the backend of its processes, and this process's device."""

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

    Required: the contract's two methods, `is_available`, `count` and `select`. Everything else has a working default.
    This includes the methods of `DeviceHooks`: they define how this kind of device draws random numbers, pins memory
    and the like, and are right for every device that `torch.accelerator` serves. `TorchAccelerator` serves any such
    device. You need your own class only for a kind of device that differs from it.
    """

    kind: ClassVar[str] = "accelerator"
    #: Whether any number of processes can share the device, as on a CPU.
    is_shared: ClassVar[bool] = False

    @property
    def backend(self) -> str:
        """The torch.distributed backend of the processes, such as `"gloo"`; a subclass may set a class attribute."""
        return "gloo"

    @abstractmethod
    def is_available(self) -> bool:
        """Return whether this machine has such a device and this torch can use it."""

    def why_absent(self) -> str:
        """Return why `is_available` returns False, with advice, as the rest of a sentence after "but"."""
        return (
            f"this machine has no such device that this torch ({torch.__version__}) can use: install a torch build for "
            "it"
        )

    @abstractmethod
    def count(self) -> int:
        """Return how many processes of one node can each have their own device."""

    @abstractmethod
    def select(self, local_rank: int) -> torch.device:
        """Make the device of the process with this local rank current, and return it.

        Raises:
            ConfigurationError: The node has too few devices for `local_rank`.
        """

    def device_of(self, local_rank: int) -> torch.device:
        """Return the device of the process with this local rank, for a process that does not use it.

        By default, this is `select`. Override it if `select` opens a device.
        """
        return self.select(local_rank)

    @abstractmethod
    def module_init_context(self) -> AbstractContextManager[object]:
        """Return the context in which factories place new tensors on the selected device."""

    @abstractmethod
    def setup(self, model: nn.Module) -> nn.Module:
        """Move the real tensors of `model` to the selected device, in place; leave deferred tensors alone."""

    def peak_memory_bytes(self) -> int | None:
        """Return the peak of this process's device memory, or None if the device does not count it."""
        return None

    def random_state(self) -> torch.Tensor | None:
        """Return the state of the device's own random generator, or None if it does not have one."""
        return None

    def set_random_state(self, state: torch.Tensor) -> None:
        """Restore a state that `random_state` returned."""
