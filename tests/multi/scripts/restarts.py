"""A training run that is interrupted at a step, and goes on from its last checkpoint when it is started again.

Every rank writes the loss of each step to a file of its own, so that the curve of several attempts can be compared.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nucleate import RandomState, Runtime
from nucleate.strategies import DDPStrategy, FSDPStrategy

STEPS = 12
SAVED_EVERY = 4
FAULT_AT = 6


class Samples(Dataset[Tensor]):
    """Samples. One of them raises an error, or kills the process that loads it."""

    def __init__(self, samples: Tensor, fault: str) -> None:
        self.samples = samples
        self.fault = fault
        self.num_loaded = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        self.num_loaded += 1
        if self.num_loaded == FAULT_AT and self.fault == "dataset":
            raise ValueError("out of cheese")
        if self.num_loaded == FAULT_AT and self.fault == "worker":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.samples[index]


def batches(runtime: Runtime, options: argparse.Namespace, state: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the batches of all epochs, from the runtime's loader or from the random stream."""
    if options.data == "drawn":
        while True:
            yield torch.randn(4, 8, device=runtime.device)
    samples = torch.arange(2 * 2 * STEPS * 8, dtype=torch.float32).reshape(-1, 8).sin()
    fault = options.fault if runtime.global_rank == 1 else ""
    workers = 2 if options.data == "workers" else 0
    loader = DataLoader(Samples(samples, fault), batch_size=4, shuffle=True, num_workers=workers)
    state["loader"] = runtime.setup_dataloaders(loader)
    yield torch.empty(0)  # the state is whole
    while True:
        yield from state["loader"]


def fail(runtime: Runtime, fault: str, state: dict[str, Any]) -> None:
    """Fail on rank 1 as asked, in the first attempt only."""
    if runtime._environment.restart_count or state["step"] != FAULT_AT or runtime.global_rank != 1:
        return
    if fault == "error":
        raise ValueError("out of cheese")
    if fault == "exit":
        os._exit(3)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


def train(runtime: Runtime, options: argparse.Namespace) -> int:
    torch.manual_seed(0)
    with runtime.init_module():
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 8))
    model, optimizer = runtime.setup(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    torch.manual_seed(runtime.global_rank)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": 0}
    state["random"] = RandomState()
    source = batches(runtime, options, state)
    if options.data != "drawn":
        next(source)
    checkpoint, curve = options.folder / "last", options.folder / f"losses.{runtime.global_rank}"
    if checkpoint.exists():
        runtime.load(checkpoint, state)
    while state["step"] < STEPS:
        batch = next(source)
        fail(runtime, options.fault, state)
        loss = model(batch).square().mean()
        runtime.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        state["step"] += 1
        with curve.open("a") as file:
            file.write(f"{state['step']} {loss.item()!r}\n")
        if not options.pause and state["step"] % SAVED_EVERY == 0:
            runtime.save(checkpoint, state)
        elif options.pause:
            if state["step"] == 1 and options.fault != "unsaved":
                runtime.save(checkpoint, state)
            if state["step"] == 2:
                sys.stdout.write(f"PID {os.getpid()}\n")
                sys.stdout.flush()
            time.sleep(options.pause)
    return int(state["step"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--way", choices=("script", "function", "spawn"), default="script")
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--devices", type=int)
    parser.add_argument("--fault", default="none")
    parser.add_argument("--data", choices=("drawn", "loader", "workers"), default="loader")
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--on-sigterm")
    parser.add_argument("--pause", type=float, default=0.0)
    options = parser.parse_args()
    kind = {"ddp": DDPStrategy, "fsdp": FSDPStrategy}[options.strategy]
    strategy = kind(start_method="spawn" if options.way == "spawn" else None)
    runtime = Runtime(
        accelerator="cpu",
        devices=options.devices,
        strategy=strategy,
        max_restarts=options.restarts,
        on_sigterm=options.on_sigterm,
    )
    if options.way == "script":
        sys.stdout.write(f"trained {train(runtime, options)}\n")
    else:
        sys.stdout.write(f"trained {runtime.launch(train, options)}\n")


if __name__ == "__main__":
    main()
