"""Kinds of device: what torch says of each in its own way, behind one set of questions."""

from nucleate.devices.hooks import DeviceHooks
from nucleate.devices.table import hooks_of, use_hooks

__all__ = ["DeviceHooks", "hooks_of", "use_hooks"]
