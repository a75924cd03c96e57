"""The table of devices: the hooks, index and generator of each device, and the devices that this process uses."""

from __future__ import annotations

import functools
import weakref
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module

import torch

from nucleate.devices.generators import AbsentGenerator, Generator
from nucleate.devices.hooks import DeviceHooks
from nucleate.devices.kinds import is_kind
from nucleate.errors import ConfigurationError

# The `"module:Class"` of each device type. `DeviceHooks` itself serves every other device.
_BUILTINS = {"cpu": "nucleate.devices.cpu:CPUHooks", "cuda": "nucleate.devices.cuda:CUDAHooks"}
_chosen: dict[str, DeviceHooks] = {}
# The devices of living accelerators, by the accelerator's id, in the order in which accelerators first took a device.
# The keys are ids because an accelerator need not be hashable, and two equal accelerators may be different objects.
_taken: dict[int, torch.device] = {}
_uses_several = False
_generators: dict[torch.device, Generator] = {}


def hooks_of(device: torch.device) -> DeviceHooks:
    """Return the hooks of a device: those of an accelerator in use, else nucleate's own."""
    chosen = _chosen.get(device.type)
    return _builtin(device.type) if chosen is None else chosen


def use_hooks(device_type: str, hooks: DeviceHooks) -> None:
    """Use an accelerator's hooks for its kind of device from now on, in this process.

    nucleate's own classes for the CPU and CUDA know more than `DeviceHooks`, for example about their generators. For
    these kinds, an accelerator's hooks are used only if they extend nucleate's class for the kind.
    """
    if isinstance(hooks, type(_builtin(device_type))):
        if type(hooks) is not type(_chosen.get(device_type)):
            _generators.clear()
        _chosen[device_type] = hooks


def take_device(device: torch.device, hooks: DeviceHooks) -> None:
    """Note that an accelerator has selected a device, and use its hooks for that kind of device."""
    global _uses_several
    use_hooks(device.type, hooks)
    if id(hooks) not in _taken:
        weakref.finalize(hooks, _taken.pop, id(hooks), None).atexit = False
    _taken[id(hooks)] = device
    _uses_several = _uses_several or len(_selected()) > 1


def made_current(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a device is the current one, if this process has used several devices.

    Code that names a device without its index means the current device. That is the one of the last accelerator made.
    """
    return hooks_of(device).made_current(device) if _uses_several else nullcontext()


def devices_taken() -> list[torch.device]:
    """Return the devices that this process uses, without the CPU.

    These are the devices that accelerators have selected, in that order. Without such a device, it is torch's current
    device, if this process has used it. This function does not initialize a device.
    """
    found = _selected()
    current = torch.accelerator.current_accelerator()
    if found or current is None:
        return found
    hooks = hooks_of(current)
    # This check comes first, because asking for the device's index can initialize the device.
    if not hooks.is_initialized(current.type) or not hooks.is_present(current):
        return []
    return [torch.device(current.type, hooks.current_index(current.type))]


def concrete(device: torch.device | str) -> torch.device:
    """Return a device with its index. Without one, it means the current device of its kind. The CPU has no index.

    Raises:
        ConfigurationError: torch knows no such device, or it is the meta device, on which tensors have no values.
    """
    named = device
    try:
        device = torch.device(named)
    except RuntimeError as error:
        kind, _, index = str(named).partition(":")
        if is_kind(kind):
            reason = f"{index!r} is not the index of a device: give the number of one, such as '{kind}:0', or {kind!r}"
        else:
            reason = (
                f"torch {torch.__version__} knows no kind of device {kind!r}. Give one that it knows, such as 'cpu'. "
                "If another package brings this kind, import that package first"
            )
        raise ConfigurationError(f"device={named!r}: {reason}.") from error
    if device.type == "meta":
        raise ConfigurationError(
            f"device={str(named)!r}: tensors on the meta device have no values. Give a device that holds them, such as "
            "'cpu' or the name of an accelerator."
        )
    if device.type == "cpu":
        return torch.device("cpu")
    if device.index is not None:
        return device
    return torch.device(device.type, hooks_of(device).current_index(device.type))


def _selected() -> list[torch.device]:
    """Return the devices that living accelerators have selected, without the CPU, each once."""
    return list(dict.fromkeys(device for device in _taken.values() if device.type != "cpu"))


def is_present(device: torch.device) -> bool:
    """Return whether this process can use a device."""
    return hooks_of(device).is_present(device)


def default_generator(device: torch.device) -> Generator:
    """Return the generator that factories and in-place fills on a device use by default, the same object each time.

    For a device that this machine does not have, it is an `AbsentGenerator`, which keeps states and draws nothing.
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
