"""Backends of torch.distributed that a user has asked for: which kinds of device they serve."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nucleate.errors import ConfigurationError


def beside_host(backend: str, device: torch.device) -> str:
    """Return a backend string that also serves host memory, in which ranks exchange objects.

    Args:
        backend: The name of a backend, or names by kind of device.
        device: The device of this process.
    """
    if ":" in backend or device.type == "cpu" or serves(backend, "cpu"):
        return backend
    return f"cpu:gloo,{device.type}:{backend}"


def check_backend(backend: str, device: torch.device) -> None:
    """Refuse a backend that cannot exchange tensors of this process's device, or of host memory.

    Args:
        backend: The name of a backend, or names by kind of device.
        device: The device of this process.

    Raises:
        ConfigurationError: The backend does not serve the device or host memory.
    """
    for kind in (device.type, "cpu"):
        if not serves(backend, kind):
            raise ConfigurationError(
                f"process_group_backend={backend!r} does not exchange tensors on {kind} devices. Leave it out, or give "
                f"a backend for each kind of device, such as 'cpu:gloo,{device.type}:...'."
            )


def serves(backend: str, device_type: str) -> bool:
    """Return whether a backend such as `"gloo"` or `"cpu:gloo,xpu:xccl"` exchanges tensors of a kind of device."""
    if ":" in backend:
        return any(part.partition(":")[0].strip() == device_type for part in backend.split(","))
    return device_type in dist.Backend.backend_capability.get(backend.lower(), [])
