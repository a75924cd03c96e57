"""Kinds of device: what torch says of each in its own way, behind one set of questions."""

from nucleate.devices.hooks import DeviceHooks
from nucleate.devices.table import devices_taken, hooks_of, take_device, use_hooks

__all__ = ["DeviceHooks", "devices_taken", "hooks_of", "take_device", "use_hooks"]
