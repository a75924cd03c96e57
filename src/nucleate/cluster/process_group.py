"""The default process group of torch: its start, its store, and its end without an abort of the interpreter.

A group that the user started is used as it is, and this module never ends it. `communicator.py` communicates over the
group.
"""

from __future__ import annotations

import atexit
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nucleate.cluster import launcher, started_rank, watch
from nucleate.cluster.backends import serves
from nucleate.cluster.environment import Environment
from nucleate.errors import ConfigurationError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_QUIESCE_S = 0.1

_started_here = False
_starts = 0


def is_running() -> bool:
    """Return whether there is a default process group, started here or by the user."""
    return dist.is_available() and dist.is_initialized()


def start(environment: Environment, backend: str, timeout: timedelta, device: torch.device) -> None:
    """Start the default process group, unless there is one already. It ends when the interpreter exits.

    A rank that a launcher started ends with its launcher from now on, also if the user started the group.

    Args:
        environment: The place of this process among all processes.
        backend: The torch.distributed backend, such as `"gloo"`.
        timeout: The time that a collective waits for the other ranks before it fails.
        device: The device of this process. An accelerator that the backend serves is bound to the group at once, so
            that a rank never opens a context on another rank's device.

    Raises:
        ConfigurationError: This torch has no torch.distributed, or the group that runs already has another
            rank or world size than the environment says.
    """
    global _started_here, _starts
    if not dist.is_available():
        raise ConfigurationError("this build of torch has no torch.distributed, which several processes need.")
    launcher.bind(environment.run_id)
    place = (environment.global_rank, environment.world_size)
    if dist.is_initialized():
        found = (dist.get_rank(), dist.get_world_size())
        if found != place:
            raise ConfigurationError(
                f"a process group runs already, with rank {found[0]} of {found[1]}, but the launcher's environment "
                f"says rank {place[0]} of {place[1]}. Start the processes with torchrun, or let nucleate start "
                "the group."
            )
        if not watch.is_on():
            watch.begin(environment, gloo_beside(dist.group.WORLD), timeout)
            atexit.register(watch.end)
        return
    bound = device if device.type != "cpu" and serves(backend, device.type) else None
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
        # (`_init_one_process_group` in torch/distributed/device_mesh.py, 2.13). If the group is not bound, a
        # DeviceMesh makes new groups.
        group.bound_device_id = None
    _started_here = True
    _starts += 1
    # Without this, gloo's threads sometimes abort the interpreter at its exit. Registering twice is harmless.
    atexit.register(stop)
    watch.begin(environment, gloo_beside(group), timeout)


def gloo_beside(group: dist.ProcessGroup | None) -> str:
    """Return the backend string of a gloo group that can be made beside a group, also if that is bound to a device.

    torch asks a new group for the backend of the device that the default group is bound to, and fails without one
    (`_new_process_group_helper` in torch/distributed/distributed_c10d.py, 2.13). By default, gloo serves only the CPU
    and CUDA. With another device in its string, gloo is still one backend, which opens nothing on the device.
    """
    bound = getattr(group, "bound_device_id", None)
    return "gloo" if bound is None else f"cpu:gloo,{bound.type}:gloo"


def stop() -> None:
    """End the default process group if `start` started it, without waiting for the other ranks."""
    global _started_here
    if not _started_here:
        return
    if is_running():
        # Before the end of the watch, which other ranks notice.
        started_rank.note_end()
    watch.end()
    if is_running():
        # A gloo thread may still wait for the GIL, to release the tensors of the last collective. DTensor's caches keep
        # the group and so its threads alive beyond `destroy_process_group` (2.13). Python cancels a thread that asks
        # for the GIL while the interpreter ends, and C++ turns this into an abort. Sleeping gives the thread the GIL in
        # time.
        time.sleep(_QUIESCE_S)
        dist.destroy_process_group()
    _started_here = False


def _store(environment: Environment, timeout: timedelta) -> Store | None:
    """Return the store by which the ranks find each other, or None to let torch read the environment."""
    if environment.launcher == "python" and environment.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    again = environment.restart_count > 0 or _starts > 0
    if again and environment.agent_store and environment.num_nodes == 1:
        # The agent's store survives a restart, so restarted workers would read the addresses of the dead
        # ones (torch/distributed/rendezvous.py, `_create_c10d_store`, 2.13), and so would a second group of
        # the same workers. A prefix for each attempt separates them. On several nodes the agents may count restarts
        # differently, so there torch makes the store.
        host, _, port = environment.agent_store.rpartition(":")
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, int(port), environment.world_size, is_master=False, timeout=timeout
        )
        return dist.PrefixStore(f"attempt{environment.restart_count}.{_starts}", store)  # type: ignore[attr-defined]
    return None
