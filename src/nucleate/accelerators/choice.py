"""Which accelerator a user's choice stands for: an object, a name, torch's name of a kind of device, or `"auto"`."""

from __future__ import annotations

import warnings
from typing import cast

from nucleate.accelerators.base import Accelerator
from nucleate.accelerators.cpu import CPUAccelerator
from nucleate.accelerators.generic import TorchAccelerator
from nucleate.devices.kinds import current_accelerator, is_kind
from nucleate.errors import ConfigurationError, PluginConflictError, PluginLoadError
from nucleate.registry import ACCELERATORS


def choose(choice: str | Accelerator) -> Accelerator:
    """Return the accelerator that is asked for, which is there.

    `"auto"` takes the accelerator that torch names as the current one if its device is there, by the plugin that is
    installed under its name or else by nucleate's own class; then the first installed plugin that says that it is
    available; then the CPU.

    Args:
        choice: What `Runtime(accelerator=...)` was given.

    Raises:
        PluginNotFoundError: Neither a plugin nor torch has that name.
        ConfigurationError: The device is not there, or this torch was not built for it.
    """
    if isinstance(choice, str):
        accelerator = _best() if choice == "auto" else _named(choice)
    else:
        accelerator = cast(Accelerator, ACCELERATORS.choose(choice))
    if not accelerator.is_available():
        raise ConfigurationError(
            f"accelerator {accelerator.name!r} was asked for, but {accelerator.why_absent()}, or use "
            "accelerator='cpu' or 'auto'."
        )
    return accelerator


def _named(name: str) -> Accelerator:
    if name not in ACCELERATORS.names() and is_kind(name) and name != "meta":
        return TorchAccelerator(name)
    return cast(Accelerator, ACCELERATORS.create(name))


def _best() -> Accelerator:
    current = current_accelerator()
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
    except (PluginLoadError, PluginConflictError) as error:
        # Nobody asked for it by name.
        warnings.warn(f"accelerator='auto' passes over a plugin: {error}", stacklevel=5)
        return None
    return plugin if plugin.is_available() else None
