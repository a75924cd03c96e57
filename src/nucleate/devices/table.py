"""Which hooks serve which device, and what follows from them: a device with its index, and its generator."""

from __future__ import annotations

import functools
from importlib import import_module

import torch

from nucleate.devices.generators import AbsentGenerator, Generator
from nucleate.devices.hooks import DeviceHooks

# Device type to `"module:Class"`; every other device is served by `DeviceHooks` itself.
_BUILTINS = {"cpu": "nucleate.devices.cpu:CPUHooks", "cuda": "nucleate.devices.cuda:CUDAHooks"}
_chosen: dict[str, DeviceHooks] = {}
_generators: dict[torch.device, Generator] = {}


def hooks_of(device: torch.device) -> DeviceHooks:
    """Return the hooks of a device: those that an accelerator in use brought, else nucleate's own."""
    chosen = _chosen.get(device.type)
    return _builtin(device.type) if chosen is None else chosen


def use_hooks(device_type: str, hooks: DeviceHooks) -> None:
    """Let an accelerator answer for its kind of device from now on, in this process."""
    _chosen[device_type] = hooks
    _generators.clear()


def concrete(device: torch.device | str) -> torch.device:
    """Return a device with its index; without one, the current device of its kind is meant. The CPU has none."""
    device = torch.device(device)
    if device.index is not None or device.type in ("cpu", "meta"):
        return torch.device("cpu") if device.type == "cpu" else device
    return torch.device(device.type, hooks_of(device).current_index(device.type))


def is_present(device: torch.device) -> bool:
    """Return whether this process can use a device."""
    return hooks_of(device).is_present(device)


def default_generator(device: torch.device) -> Generator:
    """Return the generator that factories and in-place fills on a device use by default, the same object each time.

    For a device that this machine does not have, it is one that keeps its states and cannot be drawn from.
    """
    if device.type == "cpu":
        return torch.default_generator
    device = concrete(device)
    if device in _generators:
        return _generators[device]
    if not is_present(device):
        return _absent(device)
    generator = hooks_of(device).default_generator(device)
    _generators[device] = generator
    return generator


@functools.cache
def _absent(device: torch.device) -> AbsentGenerator:
    return AbsentGenerator(device)


@functools.cache
def _builtin(device_type: str) -> DeviceHooks:
    if device_type not in _BUILTINS:
        return DeviceHooks()
    module, _, name = _BUILTINS[device_type].partition(":")
    hooks: DeviceHooks = getattr(import_module(module), name)()
    return hooks
