"""A small module of Lightning, made in each of the places where a script makes its layers, and its data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Context = Callable[[], AbstractContextManager[Any]]


class Network(nn.Sequential):
    """Layers whose constructors draw numbers, with a tied weight and buffers."""

    def __init__(self) -> None:
        # Without momentum, or the buffers would differ by rank.
        norm = nn.BatchNorm1d(16, momentum=0.0)
        super().__init__(nn.Linear(8, 16), norm, nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8))
        self[4].weight = self[3].weight
        nn.init.trunc_normal_(self[2].weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self[2](torch.relu(self[1](self[0](x))))
        return self[3](hidden) + self[4](hidden)


class Module(LightningModule):
    """A module whose layers are made in the constructor, or in the hook that `where` names."""

    def __init__(self, where: str = "init", context: Context = nullcontext) -> None:
        super().__init__()
        self.where, self.context = where, context
        self.first: dict[str, Tensor] = {}
        if where == "init":
            self.net = Network()

    def setup(self, stage: str) -> None:
        if self.where == "setup":
            self._make()

    def configure_model(self) -> None:
        if self.where == "configure_model":
            self._make()

    def _make(self) -> None:
        if not hasattr(self, "net"):
            with self.context():
                self.net = Network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.remember()
        loss = (self(batch[0]) - batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.remember()
        loss = (self(batch[0]) - batch[0]).square().mean()
        self.log("val_loss", loss, sync_dist=True)
        return loss

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.remember()
        return self(batch[0])

    def remember(self) -> None:
        """Keep the values with which the first step begins."""
        if not self.first:
            self.first = {name: tensor.clone() for name, tensor in self.state_dict().items()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    return DataLoader(TensorDataset(torch.randn(32, 8, generator=generator)), batch_size=4)


def trainer(**options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{"accelerator": "cpu", "devices": 1, **quiet, **options})


def make(where: str, context: Context) -> Module:
    """Return a module from seed 0, whose layers `context` surrounds wherever they are made."""
    seed_everything(0, verbose=False)
    with context():
        return Module(where, context)


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(mine) == list(theirs)
    assert mine
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name
