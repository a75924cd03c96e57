"""Which hooks serve which kind of device, and which devices this process uses."""

from __future__ import annotations

import functools
import weakref
from importlib import import_module

import torch

from nucleate.devices.hooks import DeviceHooks

# Device type to `"module:Class"`; every other device is served by `DeviceHooks` itself.
_BUILTINS = {"cpu": "nucleate.devices.cpu:CPUHooks", "cuda": "nucleate.devices.cuda:CUDAHooks"}
_chosen: dict[str, DeviceHooks] = {}
# By the accelerators that took them, as long as these live; the first one taken comes first.
_taken: weakref.WeakKeyDictionary[DeviceHooks, torch.device] = weakref.WeakKeyDictionary()


def hooks_of(device: torch.device) -> DeviceHooks:
    """Return the hooks of a device: those that an accelerator in use brought, else nucleate's own."""
    chosen = _chosen.get(device.type)
    return _builtin(device.type) if chosen is None else chosen


def use_hooks(device_type: str, hooks: DeviceHooks) -> None:
    """Let an accelerator answer for its kind of device from now on, in this process.

    Of the CPU and CUDA nucleate knows more than `DeviceHooks` does, such as what their generators do. There an
    accelerator answers only if it extends nucleate's class for that kind.
    """
    if isinstance(hooks, type(_builtin(device_type))):
        _chosen[device_type] = hooks


def take_device(device: torch.device, hooks: DeviceHooks) -> None:
    """Note that an accelerator has selected a device, and let it answer for its kind."""
    use_hooks(device.type, hooks)
    _taken[hooks] = device


def devices_taken() -> list[torch.device]:
    """Return the devices that this process uses, without the CPU.

    These are the ones that accelerators have selected, in that order. Where there are none it is torch's current
    device, if this process has used it.
    """
    found = list(dict.fromkeys(device for device in _taken.values() if device.type != "cpu"))
    if not found and (current := torch.accelerator.current_accelerator(check_available=True)) is not None:
        device = torch.device(current.type, hooks_of(current).current_index(current.type))
        if hooks_of(device).random_state_of(device) is not None:
            found = [device]
    return found


@functools.cache
def _builtin(device_type: str) -> DeviceHooks:
    if device_type not in _BUILTINS:
        return DeviceHooks()
    module, _, name = _BUILTINS[device_type].partition(":")
    hooks: DeviceHooks = getattr(import_module(module), name)()
    return hooks
