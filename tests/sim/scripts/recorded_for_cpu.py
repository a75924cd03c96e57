"""Models that were recorded for the CPU by hand, set up by two ranks on a device each."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tests.sim.device import install

sim = install()
sim.set_late(True)

from nucleate import Runtime  # noqa: E402 - the device comes before the first backward pass
from nucleate.deferred import deferred  # noqa: E402


def make() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.Linear(8, 7, bias=False))
    nn.init.orthogonal_(model[2].weight)
    return model


for strategy in ("ddp", "fsdp"):
    runtime = Runtime(accelerator="sim", strategy=strategy, verify="all")
    expected = make().state_dict()
    with deferred("cpu"):
        model = make()
    sim.reset_counts()
    wrapped, optimizer = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert runtime.device == torch.device("sim", runtime.local_rank)
    for name, value in model.state_dict().items():
        found = value.full_tensor() if isinstance(value, DTensor) else value
        assert found.device == runtime.device, name
        assert torch.equal(found.cpu(), expected[name]), name
    runtime.backward(wrapped(torch.ones(4, 9, device=runtime.device)).square().sum())
    optimizer.step()
sim.synchronize()
sys.stdout.write("done\n")
