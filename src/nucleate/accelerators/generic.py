"""The accelerator for any kind of device of torch.accelerator: one device for each process of a node, by local rank.

These kinds are CUDA, MPS, XPU, and every device that another package adds to torch as its PrivateUse1 backend. The
process group has gloo beside the device's own backend. So objects and tensors in host memory (offloaded parameters,
metadata) are exchanged without a copy to the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nucleate.accelerators.base import Accelerator
from nucleate.accelerators.placement import place
from nucleate.devices.kinds import is_kind
from nucleate.errors import ConfigurationError
from nucleate.plugin import Composition

#: Kinds of device that torch.accelerator does not serve, with the advice for each.
_NOT_ACCELERATORS = {
    "cpu": "the CPU is not an accelerator of torch. Use CPUAccelerator() or accelerator='cpu'",
    "meta": "tensors on the meta device have no values. Name a kind of device that holds values",
}


class TorchAccelerator(Accelerator):
    """The accelerator for one kind of device of torch.accelerator.

    Args:
        name: torch's name of the kind, such as `"xpu"`.
        index: The device of a single process; None gives each process of a node the device of its local rank.

    Raises:
        ConfigurationError: torch has no accelerator with that name, or `index` is not a device number.
    """

    def __init__(self, name: str, index: int | None = None) -> None:
        if not is_kind(name) or name in _NOT_ACCELERATORS:
            raise ConfigurationError(f"TorchAccelerator({name!r}): {_why_not(name)}.")
        if index is not None and (isinstance(index, bool) or not isinstance(index, int) or index < 0):
            raise ConfigurationError(f"index={index!r} must be None or the number of a device, at least 0.")
        self.name = name
        self._kind = name
        self._index = index
        self._device: torch.device | None = None

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Build the accelerator for the kind of device that torch calls `name`."""
        return cls(name)

    @property
    def backend(self) -> str:
        """Gloo for host memory, and torch's default backend for device memory; only gloo if the device has no backend.

        If this torch was built without the default backend, gloo also serves the device, if torch supports that.
        """
        own = self._own_backend()
        return "gloo" if own is None else f"cpu:gloo,{self._kind}:{own}"

    def is_available(self) -> bool:
        """Return whether this torch was built for the device and sees it."""
        if not self._is_built() or not self.is_present(torch.device(self._kind, self._index or 0)):
            return False
        asked = getattr(self._module(), "is_available", None)
        return asked is None or bool(asked())

    def why_absent(self) -> str:
        """Return the reason: either this torch does not support the device, or torch sees no device."""
        if not self._is_built():
            return self._why_not_built()
        if self._index is not None and (visible := self._num_visible()):
            return f"index={self._index} was given, and torch sees {visible}: give an index below {visible}"
        return f"torch sees no device: {self._what_to_check()}"

    def count(self) -> int:
        """Return how many of these devices this process sees; at most one if an index was given."""
        if not self.is_available():
            return 0
        return self._num_visible() if self._index is None else 1

    def select(self, local_rank: int) -> torch.device:
        """Make the device with number `local_rank`, or with the given index, current and return it.

        Raises:
            ConfigurationError: The device does not exist.
        """
        if not self.is_available():
            raise ConfigurationError(
                f"accelerator {self.name!r} was asked for, but {self.why_absent()}, or use accelerator='cpu'."
            )
        if local_rank >= self.count():
            if self._index is not None:
                raise ConfigurationError(self._shared(f"the process with local rank {local_rank}"))
            raise ConfigurationError(
                f"the process with local rank {local_rank} has no {self._kind} device: this node has {self.count()}. "
                f"Start at most {self.count()} processes on each node."
            )
        self._device = torch.device(self._kind, local_rank if self._index is None else self._index)
        self._make_current(self._device)
        return self._device

    def device_of(self, local_rank: int) -> torch.device:
        """Return the device with number `local_rank`, or with the given index, without opening it."""
        return torch.device(self._kind, local_rank if self._index is None else self._index)

    def check(self, composition: Composition) -> None:
        """Refuse several processes that would share one device, or that have no backend to exchange tensors."""
        environment = composition.environment
        if self._index is not None and environment.local_world_size > 1:
            raise ConfigurationError(self._shared(f"{environment.local_world_size} processes"))
        if environment.world_size > 1 and self._own_backend() is None:
            raise ConfigurationError(
                f"{environment.world_size} processes cannot exchange tensors on {self._kind} devices: "
                "torch.distributed has no backend for them. Import the package that registers one, or start one "
                "process."
            )

    def module_init_context(self) -> AbstractContextManager[object]:
        """Return the context in which factories place new tensors on the selected device."""
        return self._selected

    def setup(self, model: nn.Module) -> nn.Module:
        """Move the real tensors of `model` to the selected device, in place."""
        return place(model, self._selected)

    def peak_memory_bytes(self) -> int | None:
        """Return the peak memory of this process's tensors on its device, or None if torch does not count it."""
        try:
            return int(torch.accelerator.max_memory_allocated(self._selected))
        except (RuntimeError, ValueError, NotImplementedError):
            return None  # Not every kind of device has an allocator that counts.

    def random_state(self) -> Tensor:
        """Return the state of the device's generator."""
        return self.default_generator(self._selected).get_state()

    def set_random_state(self, state: Tensor) -> None:
        """Restore a state that `random_state` returned."""
        self.default_generator(self._selected).set_state(state.cpu())

    def __repr__(self) -> str:
        index = "" if self._index is None else f", index={self._index}"
        return f"{type(self).__name__}(name={self.name!r}{index})"

    # -- for subclasses ------------------------------------------------------------------------------------

    def _what_to_check(self) -> str:
        return "check its driver, and whether this process may use the device"

    # -- internal ------------------------------------------------------------------------------------------

    @property
    def _selected(self) -> torch.device:
        return self._device if self._device is not None else self.select(0)

    def _module(self) -> Any:
        try:
            return torch.get_device_module(self._kind)
        except RuntimeError:
            return None

    def _is_built(self) -> bool:
        """Return whether this torch, or a package that extends it, supports devices of this kind."""
        if self._module() is None:
            return False
        current = torch.accelerator.current_accelerator()
        if current is not None and current.type == self._kind:
            return True
        backend = getattr(torch.backends, self._kind, None)
        is_built = getattr(backend, "is_built", None) or getattr(self._module(), "_is_compiled", None)
        return is_built is not None and bool(is_built())

    def _why_not_built(self) -> str:
        if self._module() is None:
            return f"torch has no module torch.{self._kind}: install the package that adds it, and import it"
        return (
            f"this torch ({torch.__version__}) was built without {self._kind.upper()}: install a build of torch that "
            "has it"
        )

    def _num_visible(self) -> int:
        return int(self._module().device_count())

    def _make_current(self, device: torch.device) -> None:
        current = torch.accelerator.current_accelerator()
        if current is not None and current.type == device.type:
            torch.accelerator.set_device_index(device)
        else:
            self._module().set_device(device)

    def _own_backend(self) -> str | None:
        if not dist.is_available():
            return None
        try:
            name = dist.get_default_backend_for_device(self._kind)
        except ValueError:
            return None
        if dist.is_backend_available(name):
            return name
        # For example on Windows, where torch has no NCCL, gloo exchanges CUDA tensors.
        serves = self._kind in dist.Backend.backend_capability.get("gloo", ())
        return "gloo" if serves and dist.is_backend_available("gloo") else None

    def _shared(self, who: str) -> str:
        return (
            f"{type(self).__name__}(index={self._index}) is for one process on a node, but {who} would share "
            f"{self._kind}:{self._index}. Leave the index out, and each process gets the device of its local rank."
        )


def _why_not(name: str) -> str:
    """Return why a name is not the name of an accelerator, with advice, as the rest of a sentence."""
    kind, _, index = name.partition(":")
    if kind in _NOT_ACCELERATORS:
        return _NOT_ACCELERATORS[kind]
    if index.isdecimal() and is_kind(kind):
        return f"this is the name of one device. Give the kind and the index: TorchAccelerator({kind!r}, index={index})"
    return (
        f"torch {torch.__version__} knows no accelerator with that name. If another package adds it, import that "
        "package first"
    )
