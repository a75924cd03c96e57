"""A device that this machine does not have: factories that ask for it are told to use the meta device.

torch starts a device's runtime while it reads the arguments of a factory (`device_lazy_init`), before any mode of the
dispatcher sees the call, and that fails where the device is absent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

#: What makes a tensor of values that it is given.
FROM_DATA = frozenset((torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, Tensor.new_tensor))


def absent_as_meta(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], absent: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments with the meta device in place of an absent one, or None where a call does not ask for it.

    Args:
        func: A function of torch.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        absent: The device.
    """
    named = kwargs.get("device")
    if named is None and is_factory(func):
        named = _default_device()
    if named is None or not _means(named, absent):
        return None
    return args, {**kwargs, "device": torch.device("meta")}


def is_factory(func: Any) -> bool:
    """Return whether a function makes a tensor on the device that it is told, or on the default one."""
    from torch.utils._device import _device_constructors  # Rarely asked; torch does not import it by itself.

    return func in _device_constructors()


def _default_device() -> torch.device | None:
    """Return the device that factories use, without asking for its index as torch does."""
    from torch.utils._device import DeviceContext

    modes = reversed(_get_current_function_mode_stack())
    return next((mode.device for mode in modes if isinstance(mode, DeviceContext)), None)


def _means(value: Any, absent: torch.device) -> bool:
    if isinstance(value, int):
        return value == (absent.index or 0)
    if not isinstance(value, (str, torch.device)):
        return False
    device = torch.device(value)
    return device.type == absent.type and device.index in (None, absent.index)
