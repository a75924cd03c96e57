"""Choice of the accelerator that a user asked for: by an object, by a name, or by `"auto"`."""

from __future__ import annotations

import warnings
from typing import cast

import torch

from nucleate.accelerators.base import Accelerator
from nucleate.accelerators.cpu import CPUAccelerator
from nucleate.accelerators.generic import TorchAccelerator
from nucleate.devices.kinds import available_accelerator, is_kind
from nucleate.errors import ConfigurationError, PluginConflictError, PluginLoadError, PluginNotFoundError
from nucleate.registry import ACCELERATORS

#: Names of Lightning Fabric without an accelerator here. A plugin that registers such a name takes it over.
_ELSEWHERE = {
    "tpu": "needs a plugin for XLA devices, which does not exist yet. Use 'gpu', 'cpu' or 'auto'",
}


def choose(choice: str | Accelerator | None) -> Accelerator:
    """Return the chosen accelerator, whose device is available.

    `"auto"` takes the first available of these: torch's current accelerator, by the plugin that is installed under its
    name or else by nucleate's own class; the first installed plugin that reports itself as available; the CPU. `"gpu"`
    takes the same without the CPU.

    Args:
        choice: The argument of `Runtime(accelerator=...)`. None is `"auto"`.

    Raises:
        PluginNotFoundError: Neither a plugin nor torch has that name.
        ConfigurationError: The machine does not have the device, or this torch was not built for it.
    """
    if choice is None:
        choice = "auto"
    if isinstance(choice, str):
        accelerator = _of_name(choice)
    else:
        accelerator = cast(Accelerator, ACCELERATORS.choose(choice))
    if not accelerator.is_available():
        raise ConfigurationError(
            f"accelerator {accelerator.name!r} was asked for, but {accelerator.why_absent()}, or use "
            "accelerator='cpu' or 'auto'."
        )
    return accelerator


def _of_name(name: str) -> Accelerator:
    """Return the accelerator of a name, which may be written in upper case."""
    if name not in ACCELERATORS.names() and not is_kind(name):
        name = name.lower()
    if name in _ELSEWHERE and name not in ACCELERATORS.names():
        raise PluginNotFoundError(f"accelerator={name!r} {_ELSEWHERE[name]}.")
    if name not in ("auto", "gpu") or name in ACCELERATORS.names():
        return _named(name)
    found = _best()
    if name == "gpu" and isinstance(found, CPUAccelerator):
        raise ConfigurationError(
            "accelerator='gpu' takes the accelerator that torch finds, and torch "
            f"{torch.__version__} finds none on this machine. Check that this build of torch supports the device and "
            "that its driver is installed, or give accelerator='cpu' or 'auto'."
        )
    return found


def _named(name: str) -> Accelerator:
    kind, _, index = name.partition(":")
    if index.isdecimal() and is_kind(kind):
        raise ConfigurationError(
            f"accelerator={name!r} names one device. An accelerator's name is the name of a kind of device: "
            f"give accelerator={_of_index(kind, index)}."
        )
    if name not in ACCELERATORS.names() and is_kind(name) and name != "meta":
        return TorchAccelerator(name)
    return cast(Accelerator, ACCELERATORS.create(name))


def _of_index(kind: str, index: str) -> str:
    """Return the Python expression of an accelerator for one device."""
    accelerator = type(_named(kind))
    if accelerator is TorchAccelerator:
        return f"TorchAccelerator({kind!r}, index={index})"
    return f"{accelerator.__name__}(index={index})" if issubclass(accelerator, TorchAccelerator) else repr(kind)


def _best() -> Accelerator:
    current = available_accelerator()
    plugins = ACCELERATORS.installed_names()
    if current is not None:
        found = _plugin_if_available(current.type) if current.type in plugins else None
        return _ours(current.type) if found is None else found
    for name in plugins:
        found = _plugin_if_available(name)
        if found is not None:
            return found
    return CPUAccelerator()


def _ours(kind: str) -> Accelerator:
    if kind in ACCELERATORS.builtins:
        return cast(Accelerator, ACCELERATORS.create(kind))
    return TorchAccelerator(kind)


def _plugin_if_available(name: str) -> Accelerator | None:
    try:
        plugin = cast(Accelerator, ACCELERATORS.create(name))
        return plugin if plugin.is_available() else None
    except Exception as error:  # Any error only warns, because the user did not ask for this plugin by name.
        names_it = isinstance(error, (PluginLoadError, PluginConflictError))
        reason = error if names_it else f"accelerator {name!r} failed with {type(error).__name__}: {error}"
        warnings.warn(f"accelerator='auto' skips a plugin: {reason}", stacklevel=5)
        return None
