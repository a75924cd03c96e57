"""A training that lasts until a rank dies: all ranks step together; run by the tests of two nodes."""

from __future__ import annotations

import sys

import torch
from torch import nn

from nucleate import Runtime

if __name__ == "__main__":
    runtime = Runtime(accelerator="cpu", strategy="fsdp")
    with runtime.init_module():
        model = nn.Linear(8, 8)
    model, optimizer = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(1_000_000):
        runtime.backward(model(torch.ones(2, 8)).sum())
        optimizer.step()
        optimizer.zero_grad()
        if step == 20:
            sys.stdout.write(f"PID rank {runtime.global_rank} trains\n")
            sys.stdout.flush()
