"""Training, saving and loading over nodes, against plain torch in one process; run by the tests of two nodes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate.errors import CheckpointError, RankFailedError
from nucleate.strategies import FSDPStrategy

NUM_STEPS = 3


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))


def check_equal(model: nn.Module, eager: nn.Module, when: str) -> None:
    for (name, value), expected in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        assert torch.equal(whole, expected), f"{name} differs {when}"


def train(strategy: str, shared: Path, own: Path) -> None:
    kind = "HYBRID_SHARD" if strategy == "hsdp" else "FULL_SHARD"
    runtime = Runtime(accelerator="cpu", strategy=FSDPStrategy(sharding_strategy=kind), num_nodes=2)
    torch.manual_seed(1)
    eager = make()
    torch.manual_seed(1 + runtime.global_rank)
    with runtime.init_module():
        torch.manual_seed(1)
        model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
    model, optimizer = runtime.setup(model, optimizer)
    check_equal(model, eager, "after setup")
    # All ranks have the same batch, and the mean of equal gradients is exact for 2 and for 4 ranks.
    batch = torch.randn(4, 12, generator=torch.Generator().manual_seed(2))
    reference = torch.optim.SGD(eager.parameters(), lr=0.25, momentum=0.5)
    for _ in range(NUM_STEPS):
        runtime.backward(model(batch).square().mean())
        eager(batch).square().mean().backward()
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    check_equal(model, eager, "after training")
    check_mesh(runtime, model, strategy)

    check_saves(runtime, model, eager, shared / strategy)
    check_separate_folders(runtime, model, own)
    sys.stdout.write(f"{strategy} is right on rank {runtime.global_rank} of node {runtime.node_rank}\n")


def check_mesh(runtime: Runtime, model: nn.Module, strategy: str) -> None:
    num_local = runtime.world_size // 2
    mesh = next(model.parameters()).device_mesh
    expected = torch.arange(runtime.world_size)
    assert torch.equal(mesh.mesh, expected.view(2, num_local) if strategy == "hsdp" else expected)
    assert runtime.node_rank == runtime.global_rank // num_local


def check_saves(runtime: Runtime, model: nn.Module, eager: nn.Module, path: Path) -> None:
    for place in (path, path.with_suffix(".safetensors")):
        runtime.save(place, {"model": model})
        with runtime.init_module():
            other = make()
        other = runtime.setup(other)
        runtime.load(place, {"model": other})
        check_equal(other, eager, f"in {place.name}")


def check_separate_folders(runtime: Runtime, model: nn.Module, own: Path) -> None:
    check_refused(lambda: runtime.save(own / "folder", {"model": model}), own / "folder")
    check_refused(lambda: runtime.save(own / "one.safetensors", {"model": model}), own / "one.safetensors")
    check_refused(lambda: runtime.save(own / "hf", {"model": model}, format="safetensors"), own / "hf")
    # Nothing is left on any node, also not by DCP, which makes folders. Rank 0 may tidy up after the others' errors.
    runtime.barrier()
    assert os.listdir(own) == []
    runtime.barrier()
    if runtime.is_global_zero:
        torch.save(make().state_dict(), own / "weights.pt")
    runtime.barrier()
    check_refused(lambda: runtime.load(own / "weights.pt", {"model": model}), own / "weights.pt")
    runtime.barrier()
    if runtime.is_global_zero:
        (own / "weights.pt").unlink()


def check_refused(act: Callable[[], object], path: Path) -> None:
    with pytest.raises((CheckpointError, RankFailedError)) as refused:
        act()
    # A draft has a name of its own in the same folder.
    assert str(path.parent) in str(refused.value)
    assert path.suffix == ".pt" or "they must share the file system" in str(refused.value)


if __name__ == "__main__":
    for chosen in sys.argv[3:]:
        train(chosen, Path(sys.argv[1]), Path(sys.argv[2]))
