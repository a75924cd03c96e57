"""ZeRO stage 1: each rank keeps and saves the state of its own parameters, and runs go on exactly.

Arguments: a folder.
"""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.optim import ZeroRedundancyOptimizer

from nucleate import Runtime
from nucleate.errors import ConfigurationError
from tests.multi.device import accelerator

folder = Path(sys.argv[1])
runtime = Runtime(accelerator=accelerator(), strategy="ddp")
runtime.launch()


def made(zero: bool) -> tuple[Any, Any]:
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 2))
    if zero:
        return runtime.setup(model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2))
    return runtime.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def train(model: Any, optimizer: Any, first: int) -> list[float]:
    losses = []
    for number in range(first, first + 2):
        generator = torch.Generator("cpu").manual_seed(number)
        batch = torch.randn(4, 4, generator=generator, device="cpu").to(runtime.device)
        loss = model(batch[runtime.global_rank :: runtime.world_size]).square().mean()
        runtime.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(runtime.all_reduce(loss.detach())))
    return losses


def num_held(optimizer: Any) -> int:
    own = optimizer.optim.state.values()
    return sum(value.numel() for fields in own for value in fields.values() if value.dim())


plain = made(zero=False)
model, optimizer = made(zero=True)
assert train(model, optimizer, 0) == train(*plain, 0)
num_parameters = sum(parameter.numel() for parameter in model.parameters())
assert 0 < num_held(optimizer) < 2 * num_parameters
assert runtime.all_reduce(num_held(optimizer), reduce_op="sum") == 2 * num_parameters

paths = {"a": None, "a.pt": None, "a.safetensors": None, "folder": "safetensors"}
with mock.patch.object(ZeroRedundancyOptimizer, "consolidate_state_dict", side_effect=AssertionError):
    for name, form in paths.items():
        runtime.save(folder / name, {"model": model, "optimizer": optimizer}, format=form)
expected = train(model, optimizer, 2)
assert train(*plain, 2) == expected
for name in paths:
    for zero in (True, False):
        other = made(zero)
        runtime.load(folder / name, {"model": other[0], "optimizer": other[1]})
        assert train(*other, 2) == expected, (name, zero)

# Each rank has written its own part of the folder.
places = FileSystemReader(folder / "a").read_metadata().storage_data
moments = {place.relative_path for index, place in places.items() if index.fqn.endswith("exp_avg")}
assert len(moments) == runtime.world_size, moments

sharded = Runtime(accelerator=accelerator(), strategy="fsdp")
with sharded.init_module():
    layer = nn.Linear(2, 2)
other_optimizer = ZeroRedundancyOptimizer(layer.parameters(), torch.optim.AdamW)
with pytest.raises(ConfigurationError, match="FSDP cannot step ZeroRedundancyOptimizer"):
    sharded.setup(layer, other_optimizer)
print("done")
