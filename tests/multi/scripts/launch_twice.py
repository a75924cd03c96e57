"""Functions that one process runs in ranks, one after the other: results, errors, and the process afterwards."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nucleate import Runtime
from nucleate.errors import RankExitError, RankFailedError, UsageError


class Mine(Runtime):
    """A subclass with an argument and an attribute of its own."""

    def __init__(self, title: str) -> None:
        super().__init__(accelerator="cpu", devices=[0, 1], precision="bf16-mixed")
        self.title = title


def describe(runtime: Mine, *args: Any, **kwargs: Any) -> dict[str, Any]:
    # Again, inside of a rank: nothing is started.
    inner = Runtime(accelerator="cpu", devices=2)
    return {
        "same": type(runtime) is Mine and runtime.title == "set later" and not runtime._environment.is_planned,
        "precision": runtime.precision.name,
        "arguments": (args, kwargs),
        "tensors": runtime.all_gather(torch.tensor(float(runtime.global_rank))),
        "launcher": (inner._environment.launcher, inner.world_size, inner.launch(lambda rt: rt.global_rank)),
        "threads": (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]),
        "signals": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
        "parent": os.getppid(),
    }


def fail(runtime: Runtime, fault: str) -> Any:
    if runtime.global_rank == 1 and fault == "error":
        raise ValueError("out of cheese")
    if runtime.global_rank == 1 and fault == "exit":
        sys.exit(3)
    if runtime.global_rank == 1 and fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "lambda":
        return lambda: 0
    if fault == "large":
        return torch.ones(1_000_000) * 7
    if fault == "end":
        sys.exit(0)
    if fault == "garbage":
        gc.collect()
    runtime.barrier()
    return None


def state() -> Any:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)]
    disabled = [name for name in logging.Logger.manager.loggerDict if logging.getLogger(name).disabled]
    return dict(os.environ), handlers, disabled


def main() -> None:
    before = state()
    runtime = Mine("set first")
    runtime.title = "set later"
    assert (runtime.world_size, runtime.global_rank, runtime.strategy.name) == (2, 0, "ddp")
    # OpenMP's threads run already, and forks have none of them.
    torch.set_num_threads(2)
    torch.randn(500, 500) @ torch.randn(500, 500)
    found = runtime.launch(describe, 3, b=4)
    assert found.pop("tensors").tolist() == [0.0, 1.0]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert found == {
        "same": True,
        "precision": "bf16-mixed",
        "arguments": ((3,), {"b": 4}),
        "launcher": ("nucleate", 2, 0),
        "threads": (threads, str(threads)),
        "signals": True,
        "parent": os.getpid(),
    }
    with pytest.raises(RankFailedError, match="(?s)^rank 1 of 2 failed first:.*ValueError: out of cheese$") as raised:
        runtime.launch(fail, "error")
    assert not isinstance(raised.value, SystemExit)
    # A notebook keeps the error. The frames of its context would keep the store of the ranks.
    assert raised.value.__context__ is None
    for fault, code, message in (("exit", 3, "with the exit code 3"), ("killed", 137, "by SIGKILL")):
        with pytest.raises(RankExitError, match=message) as ended:
            runtime.launch(fail, fault)
        assert ended.value.code == code
    with pytest.raises(RankFailedError, match="(?s)which cannot be sent to the first process.*state_dict"):
        runtime.launch(fail, "lambda")
    assert runtime.launch(fail, "end") is None
    assert runtime.launch(fail, "large").sum() == 7_000_000
    # A fork that destroyed this store would wait for its thread forever.
    gc.disable()
    garbage: list[Any] = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    garbage.append(garbage)
    del garbage
    gc.enable()
    assert runtime.launch(fail, "garbage") is None
    with pytest.raises(UsageError, match="inside of that function"):
        runtime.barrier()
    assert state() == before
    assert not multiprocessing.active_children()
    print("as before")


if __name__ == "__main__":
    main()
