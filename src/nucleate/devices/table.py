"""Which hooks serve which kind of device."""

from __future__ import annotations

import functools
from importlib import import_module

import torch

from nucleate.devices.hooks import DeviceHooks

# Device type to `"module:Class"`; every other device is served by `DeviceHooks` itself.
_BUILTINS = {"cpu": "nucleate.devices.cpu:CPUHooks", "cuda": "nucleate.devices.cuda:CUDAHooks"}
_chosen: dict[str, DeviceHooks] = {}


def hooks_of(device: torch.device) -> DeviceHooks:
    """Return the hooks of a device: those that an accelerator in use brought, else nucleate's own."""
    chosen = _chosen.get(device.type)
    return _builtin(device.type) if chosen is None else chosen


def use_hooks(device_type: str, hooks: DeviceHooks) -> None:
    """Let an accelerator answer for its kind of device from now on, in this process."""
    _chosen[device_type] = hooks


@functools.cache
def _builtin(device_type: str) -> DeviceHooks:
    if device_type not in _BUILTINS:
        return DeviceHooks()
    module, _, name = _BUILTINS[device_type].partition(":")
    hooks: DeviceHooks = getattr(import_module(module), name)()
    return hooks
