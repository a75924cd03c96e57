"""A small FSDP or DDP training on 2 ranks in which rank 1 does something wrong, or nobody does."""

import os
import sys

import torch
from torch import nn

from nucleate import Precision, Runtime
from nucleate.precision import FullPrecision, HalfPrecision

strategy, fault = sys.argv[1:]


def fails(name: str) -> bool:
    return fault == name and int(os.environ["RANK"]) == 1


class Refusing(Precision):
    """Does nothing, but for one rank."""

    name = "refusing"
    dtype = torch.float32

    def module_init_context(self):
        return FullPrecision(torch.float32).module_init_context()

    def setup(self, model: nn.Module) -> nn.Module:
        if fails("precision"):
            raise ValueError("out of cheese")
        return model


precision = HalfPrecision(torch.bfloat16) if fails("another precision") else Refusing()
runtime = Runtime(accelerator="cpu", strategy=strategy, precision=precision)
with runtime.init_module(empty_init=True):
    if fails("constructor"):
        raise ValueError("out of cheese")
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    if fails("another model"):
        model.append(nn.Linear(3, 3))
if fails("another freezing"):
    model[2].weight.requires_grad_(False)
trained = nn.Linear(2, 2) if fails("another optimizer") else model
model, optimizer = runtime.setup(model, torch.optim.AdamW(trained.parameters(), lr=1e-3))
for step in range(4):
    if fails("training") and step == 2:
        raise ValueError("out of cheese")
    loss = model(torch.randn(4, 32)).square().mean()
    runtime.backward(loss)
    runtime.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
runtime.print("trained", runtime.all_reduce(loss.detach()).item())
