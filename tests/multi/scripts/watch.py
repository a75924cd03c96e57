"""One rank goes another way than the others. Each rank prints how its script ended, and after how many seconds.

Run as `watch.py CASE STRATEGY FOLDER`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time

import torch
from torch import nn

from nucleate import Runtime
from nucleate.cluster.watch import hub

CASE, STRATEGY, FOLDER = sys.argv[1:]
RANK = int(os.environ["RANK"])
IS_ODD = RANK == 1

runtime = Runtime(accelerator="cpu", strategy=STRATEGY)
start = time.monotonic()


def new_model() -> nn.Module:
    with runtime.init_module(empty_init=True):
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    runtime.backward(model(torch.randn(4, 8)).square().mean())
    optimizer.step()
    optimizer.zero_grad()


def end_here(how: str) -> None:
    if not IS_ODD:
        return
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(0)
    if how == "raises":
        raise ValueError("out of cheese")


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = new_model()
    model, optimizer = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    step(model, optimizer)
    return model, optimizer


def one_enters(call: str) -> None:
    """Only rank 0 makes a call; the other ranks train on."""
    model, optimizer = trained()
    runtime.save(f"{FOLDER}/first", {"model": model})
    if RANK == 0:
        if call == "save":
            runtime.save(f"{FOLDER}/second", {"model": model})
        elif call == "load":
            runtime.load(f"{FOLDER}/first", {"model": model})
        elif call == "load_raw":
            runtime.load_raw(f"{FOLDER}/first", model)
        elif call == "setup":
            runtime.setup(nn.Linear(2, 2))
        elif call == "evaluate":
            model.eval()
            with torch.no_grad():
                model(torch.ones(4, 8))
            model.train()
        elif call == "backward":
            runtime.backward(model(torch.ones(4, 8)).sum())
        elif call == "all_reduce":
            runtime.all_reduce(1.0)
        else:
            runtime.barrier()
    if call == "evaluate":
        runtime.barrier()
    step(model, optimizer)


def mixed(rounds: int) -> None:
    """All calls, in random order but alike on all ranks, after random pauses."""
    model, optimizer = trained()
    order = random.Random(3)
    own = random.Random(RANK)
    for _ in range(rounds):
        time.sleep(own.choice([0, 0, 0.01, 0.3, 1.5]) * own.random())
        call = order.choice(["step", "step", "step", "save", "load", "barrier", "all_reduce", "broadcast", "clip"])
        if call == "step":
            step(model, optimizer)
        elif call == "save":
            runtime.save(f"{FOLDER}/mixed", {"model": model, "optimizer": optimizer})
        elif call == "load":
            runtime.save(f"{FOLDER}/mixed", {"model": model, "optimizer": optimizer})
            runtime.load(f"{FOLDER}/mixed", {"model": model, "optimizer": optimizer})
        elif call == "barrier":
            runtime.barrier()
        elif call == "all_reduce":
            runtime.all_reduce(torch.ones(2))
        elif call == "broadcast":
            runtime.broadcast({"step": 1})
        else:
            runtime.backward(model(torch.randn(4, 8)).sum())
            runtime.clip_gradients(model, optimizer, max_norm=1.0)


def run() -> None:
    what, _, how = CASE.partition(" ")
    if what == "only":
        one_enters(how)
    elif what == "uneven":
        model, optimizer = trained()
        for _ in range(3 + RANK):
            step(model, optimizer)
    elif what == "init":
        runtime.launch()
        end_here(how)
        new_model()
        trained()
    elif what == "load":
        model, _ = trained()
        runtime.save(f"{FOLDER}/first", {"model": model})
        end_here(how)
        runtime.load(f"{FOLDER}/first", {"model": model})
    elif what == "step":
        model, optimizer = trained()
        end_here(how)
        step(model, optimizer)
    elif what == "forward":
        # Without buffers DDP exchanges nothing in forward, but for the order of its buckets in the second one.
        model = runtime.setup(nn.Linear(8, 2))
        runtime.backward(model(torch.randn(4, 8)).sum())
        end_here(how)
        # The death of the other process takes a moment, and a forward that begins before waits like any other call.
        time.sleep(0.5)
        model(torch.randn(4, 8))
    elif what == "names":
        runtime.all_reduce(1) if IS_ODD else runtime.broadcast(1)
    elif what == "barrier":
        runtime.barrier() if IS_ODD else runtime.broadcast(1)
    elif what == "late":
        hub.LONG_S = min(hub.LONG_S, float(how) / 2)
        runtime.launch()
        time.sleep(float(how) if RANK == 0 else 0)
        runtime.barrier()
    elif what == "mixed":
        mixed(int(how))
    else:
        raise ValueError(CASE)


def tell(error: str = "", text: str = "") -> None:
    """Print how the script ended, in one write: two ranks would mix the words of `print`."""
    facts = {"rank": RANK, "seconds": time.monotonic() - start, "error": error, "text": text}
    sys.stdout.write(f"{json.dumps(facts)}\n")
    sys.stdout.flush()


try:
    run()
except Exception as error:
    tell(type(error).__name__, str(error))
    raise
tell()
