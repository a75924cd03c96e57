"""Devices that this machine does not have: factories for such a device use the meta device instead.

torch starts a device's runtime while it reads the arguments of a factory (`device_lazy_init`). This happens before any
mode of the dispatcher sees the call, and it fails if the device is absent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

#: Functions that make a tensor from given values.
FROM_DATA = frozenset((torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, Tensor.new_tensor))


def absent_as_meta(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], absent: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments with the meta device in place of an absent one, or None if a call does not use that one.

    Args:
        func: A function of torch.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        absent: The absent device.
    """
    named = kwargs.get("device")
    if named is None and is_factory(func):
        named = _default_device()
    if named is None or not _means(named, absent):
        return None
    return args, {**kwargs, "device": torch.device("meta")}


def is_factory(func: Any) -> bool:
    """Return whether a function makes a tensor on its `device` argument, or else on the default device."""
    from torch.utils._device import _device_constructors  # Rarely needed, and torch does not import it itself.

    return func in _device_constructors()


def _default_device() -> torch.device | None:
    """Return the default device of factories, without asking for its index as torch does."""
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
