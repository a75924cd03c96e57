"""Models that come and go in one process: after `del` and a collection all of their memory is free.

Arguments: the strategy, the number of rounds, and a folder that all ranks see.
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from nucleate import Runtime
from nucleate.report import anonymous_bytes

MIB = 2**20
WIDTH = 256


class Block(nn.Module):
    """Has a parameter that FSDP does not shard."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x)) * self.scale


def build() -> nn.Module:
    return nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 2))


def one_round(runtime: Runtime, number: int, folder: Path) -> tuple[weakref.ref[nn.Module], weakref.ref[Tensor]]:
    """Construct, set up and train one model, in one of several ways, and forget it."""
    with runtime.init_module(empty_init=number % 2 == 0):
        model = build()
    way = number % 5
    if way == 1:
        runtime.load_raw(folder / "weights.safetensors", model)
    elif way == 2:
        model[0] = checkpoint_wrapper(model[0])
    elif way == 3 and number % 10 == 3:
        model = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = runtime.setup(model, optimizer)
    for is_last in (False, True):
        with runtime.no_backward_sync(model, enabled=way == 4 and not is_last):
            runtime.backward(model(torch.ones(2, WIDTH)).square().mean())
    runtime.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
    if number % 20 == 0:
        runtime.save(folder / "state", {"model": model, "optimizer": optimizer})
        runtime.load(folder / "state", {"model": model, "optimizer": optimizer})
    momentum = optimizer.state[model[2].weight]["momentum_buffer"]
    local = momentum.to_local() if hasattr(momentum, "to_local") else momentum
    return weakref.ref(model.module), weakref.ref(local)


def kept() -> tuple[int, int]:
    """Return the numbers of open files and of threads."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def main(strategy: str, num_rounds: int, folder: Path) -> None:
    runtime = Runtime(accelerator="cpu", strategy=strategy)
    runtime.save(folder / "weights.safetensors", build())
    # Whatever is made once is made in these rounds: imports, caches of torch, threads.
    for number in range(40):
        one_round(runtime, number, folder)
    gc.collect()
    gc.freeze()  # The collections below then look at new objects only.
    before, bytes_before = kept(), anonymous_bytes()
    alive = []
    for number in range(num_rounds):
        alive += one_round(runtime, number, folder)
        gc.collect()
        remaining = [ref for ref in alive if ref() is not None]
        assert not remaining, f"round {number}: {len(remaining)} of {len(alive)} models and momentums are kept"
    assert kept() == before, f"files and threads: {before} before, {kept()} after"
    grown = ((anonymous_bytes() or 0) - (bytes_before or 0)) / MIB
    # One kept model of 0.5 MiB, or its momentum, in each round would make 50 MiB or more.
    assert grown < 8, f"{grown:.1f} MiB more after {num_rounds} rounds"
    print(f"{num_rounds} rounds: {grown:.1f} MiB")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
