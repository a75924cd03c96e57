"""Kinds of device: one interface to functions that torch offers in a different way for each kind."""

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
