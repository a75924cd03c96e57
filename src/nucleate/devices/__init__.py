"""Kinds of device: what torch says of each in its own way, behind one set of questions."""

from nucleate.devices.hooks import DeviceHooks
from nucleate.devices.staging import Staging, casts_there, move, slabs
from nucleate.devices.table import (
    concrete,
    default_generator,
    devices_taken,
    hooks_of,
    is_present,
    made_current,
    take_device,
    use_hooks,
)

__all__ = [
    "DeviceHooks",
    "Staging",
    "casts_there",
    "concrete",
    "default_generator",
    "devices_taken",
    "hooks_of",
    "is_present",
    "made_current",
    "move",
    "slabs",
    "take_device",
    "use_hooks",
]
