"""The whole state of a training run, with everything wrapped as `Runtime` wraps it, goes on exactly after a load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nucleate.checkpoint import load, open_checkpoint, save
from nucleate.cluster import Communicator
from nucleate.precision import MixedPrecision, Precision
from nucleate.registry import STRATEGIES
from nucleate.seed import RandomState, seed_everything
from nucleate.wrappers.dataloader import prepare
from nucleate.wrappers.module import ModuleWrapper
from nucleate.wrappers.optimizer import OptimizerWrapper
from tests.device import ACCELERATOR, device, on_device


@dataclass
class Run:
    model: nn.Module
    optimizer: OptimizerWrapper
    scheduler: Any
    precision: Precision
    loader: Any

    @classmethod
    def start(cls, seed: int) -> Run:
        seed_everything(seed)
        with on_device():
            original = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1))
        precision: Any = MixedPrecision(device_type=ACCELERATOR)
        strategy: Any = STRATEGIES.create("single_device")
        model = ModuleWrapper(original, original, precision, strategy)
        optimizer = OptimizerWrapper(torch.optim.AdamW(model.parameters(), lr=0.05), precision)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        data = TensorDataset(torch.arange(64.0).view(16, 4) / 64)
        plain = DataLoader(data, batch_size=4, shuffle=True)
        loader: Any = prepare(plain, num_replicas=1, rank=0, device=device())
        return cls(model, optimizer, scheduler, precision, loader)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "precision": self.precision,
            "loader": self.loader,
            "random": RandomState(),
            "step": 0,
        }

    def train(self, epochs: int) -> list[float]:
        losses = []
        for _ in range(epochs):
            for (batch,) in self.loader:
                loss = self.model(batch).square().mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.scheduler.step()
                losses.append(loss.item())
        return losses


def test_a_run_with_everything_wrapped_goes_on_exactly(tmp_path: Path, solo: Communicator) -> None:
    run = Run.start(seed=1)
    run.train(2)
    save(tmp_path / "c", {**run.state(), "step": 8}, solo)
    expected = run.train(2)

    other = Run.start(seed=2)
    state = other.state()
    assert load(tmp_path / "c", state, solo) == {}
    assert state["step"] == 8
    assert other.train(2) == expected


def test_the_keys_of_a_wrapped_model_are_the_models_own(tmp_path: Path, solo: Communicator) -> None:
    run = Run.start(seed=1)
    save(tmp_path / "c", {"model": run.model}, solo)
    contents = open_checkpoint(tmp_path / "c")
    assert set(contents.skeleton["model"]) == set(run.model.state_dict())
    original: Any = run.model.module
    load(tmp_path / "c", {"model": original}, solo)
