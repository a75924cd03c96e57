"""Kinds of device: what torch says of each in its own way, behind one set of questions."""

from nucleate.devices.hooks import DeviceHooks
from nucleate.devices.staging import Staging, casts_there, move, slabs
from nucleate.devices.table import hooks_of, use_hooks

__all__ = ["DeviceHooks", "Staging", "casts_there", "hooks_of", "move", "slabs", "use_hooks"]
