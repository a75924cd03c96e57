"""What the tests of the command share: a file, a folder with shards, and a training state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nucleate import Runtime
from nucleate.checkpoint import convert
from tests.cli.commands import Here


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(capsys)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {
        "layers.0.weight": torch.full((4, 6), 0.5),
        "layers.1.weight": torch.full((4, 6), 1.5),
        "norm": torch.ones(6).bfloat16(),
        "count": torch.tensor(3),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"author": "somebody"})
    return tmp_path / "a.safetensors"


@pytest.fixture
def folder(file: Path, tmp_path: Path) -> Path:
    convert(file, tmp_path / "folder", format="safetensors", max_shard_size=100)
    return tmp_path / "folder"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture
def training(tmp_path: Path) -> Path:
    runtime = Runtime(accelerator="cpu")
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = runtime.setup(model, optimizer)
    runtime.backward(model.head(model.embed(torch.arange(3))).sum())
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "step": 3, "config": {"lr": float("inf"), "names": ["a", None]}}
    runtime.save(tmp_path / "training", state)
    return tmp_path / "training"
