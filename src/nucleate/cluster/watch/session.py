"""The watch of the group that runs: its start with the group, and its end with the process."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from nucleate.cluster.environment import Environment
from nucleate.cluster.watch.calls import CALLS

if TYPE_CHECKING:
    from nucleate.cluster.watch.watcher import Watcher

_current: Watcher | None = None
_starts = 0


def is_on() -> bool:
    """Return whether this process watches over a group."""
    return _current is not None


def begin(environment: Environment, backend: str, timeout: timedelta) -> None:
    """Begin to watch over the default group. All ranks call this function.

    Args:
        environment: The place of this process among all processes.
        backend: The backend string of a gloo group beside the default group.
        timeout: The time that a rank waits for the others at the beginning of a meeting.
    """
    global _current, _starts
    if environment.world_size == 1:
        return
    # Imported here: a single process needs neither the watch nor what it imports.
    from nucleate.cluster.watch.watcher import Watcher

    end()
    if _starts == 0:
        os.register_at_fork(after_in_child=_forget)
    _starts += 1
    group = dist.new_group(backend=backend, timeout=timeout)
    default: Any = dist.distributed_c10d._get_default_store()
    # A call of the user's thread may wait in the other connection, and keeps it locked.
    store = default.clone()
    store.set_timeout(timeout)
    watcher = Watcher(environment.global_rank, environment.world_size, group, store)
    watcher.start(_hosts(environment), timeout, f"nucleate/watch/{environment.restart_count}/{_starts}")
    _current = CALLS.watch = watcher
    _show_aborts()


def end(error: BaseException | None = None) -> None:
    """Tell the other ranks that this process ends, with the exception that ends it.

    Args:
        error: The exception. None means the one that Python has printed already, if there is one.
    """
    global _current
    watcher, _current = _current, None
    if watcher is not None:
        watcher.end(_reason(error))
    CALLS.forget()


def _forget() -> None:
    """Forget the watch in a process that was forked, such as a worker of a data loader."""
    global _current
    watcher, _current = _current, None
    CALLS.forget()
    if watcher is not None:
        watcher.forget()


def _show_aborts() -> None:
    """Let Python print its stacks if gloo aborts the process.

    It does so where two ranks enter collectives of different sizes on one group, and says nothing itself (2.13).
    """
    import faulthandler

    with contextlib.suppress(AttributeError, OSError, ValueError):  # a stream without a descriptor
        if not faulthandler.is_enabled():
            faulthandler.enable()


def _hosts(environment: Environment) -> list[str]:
    """Return the names and addresses under which other ranks may reach this machine, the likeliest first."""
    if environment.num_nodes == 1:
        return ["127.0.0.1"]
    address, _, port = environment.store_address.rpartition(":")
    hosts = [address, socket.gethostname()]
    try:
        with socket.create_connection((address, int(port)), timeout=1) as connection:
            hosts.insert(0, connection.getsockname()[0])
    except OSError:
        pass
    return list(dict.fromkeys(host for host in hosts if host))


def _reason(error: BaseException | None) -> str:
    """Return the exception that ends this process in one line."""
    error = error or getattr(sys, "last_value", None)
    if error is None:
        return ""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
