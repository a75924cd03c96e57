"""What process groups promise beside a device whose backend gloo does not name and that cannot be split.

Run on 2 ranks with an index each, or on 4 with two to an index.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.sim.device import install

sim = install()
sim.set_late(True)

from nucleate import RandomState, Runtime  # noqa: E402 - the device comes before the first backward pass
from nucleate.accelerators import TorchAccelerator  # noqa: E402
from nucleate.cluster import save_group  # noqa: E402
from nucleate.errors import ConfigurationError  # noqa: E402
from nucleate.strategies import DDPStrategy, FSDPStrategy, Strategy  # noqa: E402

FOLDER, RANKS = Path(sys.argv[1]), int(sys.argv[2])


class Shared(TorchAccelerator):
    """Gives an index to several ranks, which no real device would want."""

    def select(self, local_rank: int) -> torch.device:
        return super().select(local_rank % 2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("scale", torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.first(x)) * self.scale
        return result


def train_and_save(runtime: Runtime, name: str) -> float:
    """Train two steps, save in two formats and in the background, load, and return the last norm."""
    torch.manual_seed(3)
    with runtime.init_module(empty_init=True):
        net = Net()
    model, optimizer = runtime.setup(net, torch.optim.AdamW(net.parameters()))
    norm = 0.0
    for _ in range(2):
        runtime.backward(model(torch.ones(2, 8, device=runtime.device)).sum())
        norm = float(runtime.clip_gradients(model, optimizer, max_norm=0.5))
        optimizer.step()
        optimizer.zero_grad()
    state = {"model": model, "optimizer": optimizer, "random": RandomState()}
    drawn: list[Tensor] = []
    for suffix in ("", ".pt"):
        runtime.save(FOLDER / f"{name}{suffix}", state)
        drawn.append(torch.rand(3, device=runtime.device))
    runtime.load(FOLDER / f"{name}.pt", state)
    assert torch.equal(torch.rand(3, device=runtime.device), drawn[1])
    runtime.load(FOLDER / name, state)
    assert torch.equal(torch.rand(3, device=runtime.device), drawn[0])
    handle = runtime.save(FOLDER / f"{name}-later", state, asynchronous=True)
    assert handle is not None
    handle.wait()
    return norm


def check_collectives(runtime: Runtime) -> None:
    here, rank = runtime.device, runtime.global_rank
    assert runtime.all_reduce(torch.ones(1, device=here), reduce_op="sum").item() == RANKS
    assert runtime.all_gather(torch.tensor([rank])).flatten().tolist() == list(range(RANKS))
    received = runtime.broadcast({"a": torch.full((2,), rank, device=here), "b": rank})
    assert received["a"].device == here
    assert received["a"].tolist() == [0, 0]
    assert received["b"] == 0
    runtime.barrier()


def with_a_group_of_ours() -> None:
    accelerator = TorchAccelerator("sim") if RANKS == 2 else Shared("sim")
    strategies: dict[str, Strategy] = {"ddp": DDPStrategy(), "fsdp": FSDPStrategy()}
    if RANKS == 4:
        strategies["hsdp"] = FSDPStrategy(num_replicas=2)
    norms = []
    for name, strategy in strategies.items():
        runtime = Runtime(accelerator=accelerator, strategy=strategy)
        assert runtime.device == torch.device("sim", runtime.local_rank % 2)
        norms.append(train_and_save(runtime, name))
        check_collectives(runtime)
    assert max(norms) - min(norms) < 1e-4, norms


def with_a_group_of_the_users() -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("cpu:gloo,sim:simccl", device_id=torch.device("sim", rank % 2))
    runtime = Runtime(accelerator=TorchAccelerator("sim"), strategy="ddp")
    assert dist.group.WORLD is not None
    assert dist.group.WORLD.bound_device_id == runtime.device
    train_and_save(runtime, "ddp")
    check_collectives(runtime)
    assert dist.group.WORLD.bound_device_id == runtime.device


if sys.argv[3] == "ours":
    with_a_group_of_ours()
else:
    with_a_group_of_the_users()
assert save_group._current is not None
assert "simccl" not in dist.get_backend_config(save_group._current.process_group), "a second communicator"
with pytest.raises(ConfigurationError, match="would share sim:1"):
    Runtime(accelerator=TorchAccelerator("sim", index=1))
sys.stdout.write("done\n")
