"""A process that has imported torch and forks ranks: importing it on each rank takes longer than most checks.

Run as `python -m tests.multi.fork_server FD`, with a socket on which it is asked; `ranks.fork_ranks` asks. For each
request it forks a launcher, which forks the ranks and does what torchrun's agent does: it keeps the store, gives the
ranks their variables, and ends all of them when one has failed. A rank runs its script from the top of this module, so
that the interpreter ends as it does for a script: exit functions, threads, destructors.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

# What most scripts import, or torch for them: DDP and optimizers ask for dynamo. No thread may run here: a forked
# process has only the thread that forked it.
import pytest  # noqa: F401
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401

import nucleate
import nucleate.checkpoint
import nucleate.strategies  # noqa: F401

Script = Callable[[], object]
_POLL_S = 0.02


def serve(asked: socket.socket) -> Script | None:
    """Fork a launcher for each request; return in a rank with its script, and here when nobody asks any more."""
    gc.freeze()  # or a collection would copy what is shared
    launchers = []
    while True:
        message, descriptors, _, _ = socket.recv_fds(asked, 1 << 16, 3)
        if not message:
            break
        launchers = [pid for pid in launchers if os.waitpid(pid, os.WNOHANG)[0] == 0]
        pid = os.fork()
        if pid == 0:
            asked.close()
            return launch(json.loads(message), *descriptors)
        launchers.append(pid)
        for descriptor in descriptors:
            os.close(descriptor)
    for pid in launchers:
        os.waitpid(pid, 0)
    return None


def launch(request: dict[str, Any], answers: int, out: int, err: int) -> Script:
    """Fork the ranks and return in each with its script; the launcher itself answers, and ends here."""
    os.setsid()  # whoever asked ends all by ending this group
    with socket.socket(fileno=answers) as answer:
        answer.sendall(f"{os.getpid()}\n".encode())
        os.dup2(out, 1)
        os.dup2(err, 2)
        world_size, joined = request["nproc"], request["joined"]
        start, go = os.pipe()
        pids = []
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                answer.close()
                os.close(go)
                port = os.read(start, 5).decode()
                os.close(start)
                return take_place(request, rank, port)
            pids.append(pid)
        # The store has threads, so it comes after the forks. Without a launcher rank 0 makes its own.
        store = dist.TCPStore("127.0.0.1", 0, world_size, True, timedelta(seconds=60), wait_for_workers=False)  # type: ignore[attr-defined]
        port = store.port
        if not joined:
            del store
        os.write(go, f"{port:5}".encode() * world_size)
        answer.sendall(json.dumps(wait(pids, end_others=joined)).encode())
    os._exit(0)


def wait(pids: list[int], end_others: bool) -> list[int]:
    """Wait for all ranks and return what each exited with, negative for a signal."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if end_others and any(codes.values()):
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGTERM)
            end_others = False
        time.sleep(_POLL_S)
    return [codes[pid] for pid in pids]


def take_place(request: dict[str, Any], rank: int, port: str) -> Script:
    """Make this process what torchrun makes of a fresh one, and return the script to run."""
    # The interpreter ends by several collections over all objects of torch, which take longer than most checks.
    atexit.register(gc.freeze)
    world_size = str(request["nproc"])
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=world_size, LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port.strip()
    )
    if request["joined"]:
        os.environ.update(
            LOCAL_WORLD_SIZE=world_size,
            GROUP_RANK="0",
            TORCHELASTIC_RESTART_COUNT="0",
            TORCHELASTIC_MAX_RESTARTS="0",
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
    target = request["target"]
    sys.argv = [target, *request["args"]]
    if target.endswith(".py"):
        sys.path[0] = os.path.dirname(target)
        return lambda: runpy.run_path(target, run_name="__main__")
    return lambda: runpy.run_module(target, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    script = serve(socket.socket(fileno=int(sys.argv[1])))
    if script is not None:
        script()
