"""Which hooks serve which device, its index and its generator, and which devices this process uses."""

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

# Device type to `"module:Class"`; every other device is served by `DeviceHooks` itself.
_BUILTINS = {"cpu": "nucleate.devices.cpu:CPUHooks", "cuda": "nucleate.devices.cuda:CUDAHooks"}
_chosen: dict[str, DeviceHooks] = {}
# By the ids of the accelerators that took them, as long as these live; the first one taken comes first. An accelerator
# need not be hashable, and equal ones are not the same one.
_taken: dict[int, torch.device] = {}
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
    if id(hooks) not in _taken:
        weakref.finalize(hooks, _taken.pop, id(hooks), None).atexit = False
    _taken[id(hooks)] = device
    _uses_several = _uses_several or len(_selected()) > 1


def made_current(device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a device is the current one, if this process has used another one as well.

    Code that names a device without its index means the current one, which is that of the last accelerator made.
    """
    return hooks_of(device).made_current(device) if _uses_several else nullcontext()


def devices_taken() -> list[torch.device]:
    """Return the devices that this process uses, without the CPU.

    These are the ones that accelerators have selected, in that order. Where there are none it is torch's current
    device, if this process has used it. Asking does not initialize a device.
    """
    found = _selected()
    current = torch.accelerator.current_accelerator()
    if found or current is None:
        return found
    hooks = hooks_of(current)
    # Before its index is asked for, which can initialize it.
    if not hooks.is_initialized(current.type) or not hooks.is_present(current):
        return []
    return [torch.device(current.type, hooks.current_index(current.type))]


def concrete(device: torch.device | str) -> torch.device:
    """Return a device with its index; without one, the current device of its kind is meant. The CPU has none.

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
