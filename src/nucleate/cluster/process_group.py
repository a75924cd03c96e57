"""Starts and ends torch's default process group; decides the store, and that nobody aborts at exit.

A group that the user started is used as it is and never ended here. What is said over the group is the
communicator's business.
"""

from __future__ import annotations

import atexit
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nucleate.cluster.environment import Environment
from nucleate.errors import ConfigurationError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_QUIESCE_S = 0.1

_started_here = False
_starts = 0


def is_running() -> bool:
    """Return whether there is a default process group, whoever started it."""
    return dist.is_available() and dist.is_initialized()


def start(environment: Environment, backend: str, timeout: timedelta, device: torch.device) -> None:
    """Start the default process group, unless there is one already; it ends when the interpreter exits.

    Args:
        environment: Which process this is, of how many.
        backend: The torch.distributed backend, such as `"gloo"`.
        timeout: How long a collective waits for the other ranks before it fails.
        device: The device of this process; an accelerator that the backend serves is bound to the group at once, so
            that a rank never opens a context on another rank's device.

    Raises:
        ConfigurationError: This torch has no torch.distributed, or the group that runs already has another
            rank or world size than the environment says.
    """
    global _started_here, _starts
    if not dist.is_available():
        raise ConfigurationError("this build of torch has no torch.distributed; several processes need one that has.")
    place = (environment.global_rank, environment.world_size)
    if dist.is_initialized():
        found = (dist.get_rank(), dist.get_world_size())
        if found != place:
            raise ConfigurationError(
                f"a process group runs already, with rank {found[0]} of {found[1]}, but the launcher's environment "
                f"says rank {place[0]} of {place[1]}. Start the processes with torchrun, or let nucleate start "
                "the group."
            )
        return
    bound = device if _serves(backend, device.type) else None
    dist.init_process_group(
        backend,
        store=_store(environment, timeout),
        rank=environment.global_rank,
        world_size=environment.world_size,
        timeout=timeout,
        device_id=bound,
    )
    group = dist.group.WORLD
    assert group is not None
    if bound is not None and not group._get_backend(bound).supports_splitting:
        # A DeviceMesh splits a group that is bound to a device, and fails where the backend cannot be split
        # (`_init_one_process_group` in torch/distributed/device_mesh.py, 2.13). Of a group that is not bound it makes
        # new groups.
        group.bound_device_id = None
    _started_here = True
    _starts += 1
    # Without this gloo's threads now and then abort the interpreter's exit. Registering twice is harmless.
    atexit.register(stop)


def gloo_beside(group: dist.ProcessGroup | None) -> str:
    """Return the backend string of a gloo group that can be made beside a group, whatever device that is bound to.

    torch asks a new group for the backend of the device that the default group is bound to, and fails where it has none
    (`_new_process_group_helper` in torch/distributed/distributed_c10d.py, 2.13). Of itself gloo names the CPU and CUDA
    only. Named for another device as well it is still one backend, which opens nothing on the device.
    """
    bound = getattr(group, "bound_device_id", None)
    return "gloo" if bound is None else f"cpu:gloo,{bound.type}:gloo"


def _serves(backend: str, device_type: str) -> bool:
    """Return whether a backend such as `"gloo"` or `"cpu:gloo,xpu:xccl"` exchanges tensors of an accelerator."""
    if device_type == "cpu":
        return False
    if ":" in backend:
        return any(part.partition(":")[0].strip() == device_type for part in backend.split(","))
    return device_type in dist.Backend.backend_capability.get(backend.lower(), [])


def stop() -> None:
    """End the default process group if `start` started it. Does not wait for the other ranks."""
    global _started_here
    if _started_here and is_running():
        # A gloo thread may still wait for the GIL, to let go of the tensors of the last collective. DTensor's
        # caches keep the group and so its threads alive beyond `destroy_process_group` (2.13), and a thread
        # that asks for the GIL while the interpreter ends is cancelled, which C++ turns into an abort. Sleeping
        # hands it the GIL in time.
        time.sleep(_QUIESCE_S)
        dist.destroy_process_group()
    _started_here = False


def _store(environment: Environment, timeout: timedelta) -> Store | None:
    """Return where the ranks find each other, or None for torch's own reading of the environment."""
    if environment.launcher == "python" and environment.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    again = environment.restart_count > 0 or _starts > 0
    if again and environment.agent_store and environment.num_nodes == 1:
        # The agent's store survives a restart, so restarted workers would read the addresses of the dead
        # ones (torch/distributed/rendezvous.py, `_create_c10d_store`, 2.13), and so would a second group of
        # the same workers. A prefix for each attempt keeps them apart. On several nodes the agents may count
        # differently, so there torch's way stays.
        host, _, port = environment.agent_store.rpartition(":")
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, int(port), environment.world_size, is_master=False, timeout=timeout
        )
        return dist.PrefixStore(f"attempt{environment.restart_count}.{_starts}", store)  # type: ignore[attr-defined]
    return None
