"""Which hooks serve which device, its index and its generator, and which devices this process uses."""

from __future__ import annotations

import functools
import weakref
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module

import torch

from nucleate.devices.generators import AbsentGenerator, Generator
from nucleate.devices.hooks import DeviceHooks
from nucleate.devices.kinds import current_accelerator

# Device type to `"module:Class"`; every other device is served by `DeviceHooks` itself.
_BUILTINS = {"cpu": "nucleate.devices.cpu:CPUHooks", "cuda": "nucleate.devices.cuda:CUDAHooks"}
_chosen: dict[str, DeviceHooks] = {}
# By the accelerators that took them, as long as these live; the first one taken comes first.
_taken: weakref.WeakKeyDictionary[DeviceHooks, torch.device] = weakref.WeakKeyDictionary()
_uses_several = False
_generators: dict[torch.device, Generator] = {}


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
        if type(hooks) is not type(_chosen.get(device_type)):
            _generators.clear()
        _chosen[device_type] = hooks


def take_device(device: torch.device, hooks: DeviceHooks) -> None:
    """Note that an accelerator has selected a device, and let it answer for its kind."""
    global _uses_several
    use_hooks(device.type, hooks)
    _taken[hooks] = device
    _uses_several = _uses_several or len(devices_taken()) > 1


def made_current(device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a device is the current one, if this process has used another one as well.

    Code that names a device without its index means the current one, which is that of the last accelerator made.
    """
    return hooks_of(device).made_current(device) if _uses_several else nullcontext()


def devices_taken() -> list[torch.device]:
    """Return the devices that this process uses, without the CPU.

    These are the ones that accelerators have selected, in that order. Where there are none it is torch's current
    device, if this process has used it.
    """
    found = list(dict.fromkeys(device for device in _taken.values() if device.type != "cpu"))
    if not found and (current := current_accelerator()) is not None:
        device = torch.device(current.type, hooks_of(current).current_index(current.type))
        if hooks_of(device).random_state_of(device) is not None:
            found = [device]
    return found


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
