"""The options of the process group that a strategy asks for: its backend, and how long a collective waits."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from nucleate.errors import ConfigurationError, name_list


def checked_backend(backend: str | None) -> str | None:
    """Return the name of a backend, in lower case, or None.

    Args:
        backend: A name such as `"gloo"`, or one for each kind of device, such as `"cpu:gloo,xpu:xccl"`.

    Raises:
        ConfigurationError: This torch has no such backend.
    """
    if backend is None:
        return None
    available = [name for name in dist.Backend.backend_list if name != "undefined" and dist.is_backend_available(name)]
    parts = backend.lower().split(",") if isinstance(backend, str) else [""]
    for part in parts:
        if part.rpartition(":")[2].strip() not in available:
            raise ConfigurationError(
                f"process_group_backend={backend!r} must be a backend that this torch has, or a list such as "
                f"'cpu:gloo': {name_list(available)}. None takes the backend of the accelerator."
            )
    return ",".join(parts)


def checked_timeout(timeout: timedelta | None) -> timedelta:
    """Return a timeout; None stands for ten minutes.

    Raises:
        ConfigurationError: It is not a `timedelta`, or not above 0.
    """
    if timeout is None:
        return timedelta(minutes=10)
    if not isinstance(timeout, timedelta) or timeout <= timedelta(0):
        raise ConfigurationError(
            f"timeout={timeout!r} must be a datetime.timedelta above 0, such as timedelta(minutes=30)."
        )
    return timeout
