"""Modules that bring their steps, for a script's own trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nucleate.compat.fabric import Fabric
from nucleate.compat.pieces.lightning_module import LightningModule, is_overridden
from nucleate.compat.pieces.unwrapping import unwrap_objects
from nucleate.errors import UsageError


class Module(LightningModule):
    def __init__(self, width: int, depth: int = 2, **others: Any) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="depth")
        self.layer = nn.Linear(width, 1)
        self.ended: list[int] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).sum()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_epoch_end(self) -> None:
        self.ended.append(1)


class Log:
    def __init__(self) -> None:
        self.rows: list[Any] = []

    def log_metrics(self, metrics: Any, step: int) -> None:
        self.rows.append((step, metrics))


def test_a_module_trains_by_its_own_step_and_logs_through_the_fabric() -> None:
    log, module = Log(), Module(2)
    fabric = Fabric(accelerator="cpu", loggers=log)
    model, optimizer = fabric.setup(module, module.configure_optimizers())
    fabric.backward(model.training_step(torch.ones(1, 2), 0))
    optimizer.step()
    assert [step for step, _ in log.rows] == [0]
    assert module.fabric is fabric
    assert unwrap_objects([model, optimizer]) == [module, optimizer.optimizer]
    model.on_train_epoch_end()
    model.on_train_epoch_start()
    assert module.ended == [1]


def test_arguments_of_the_constructor_are_kept() -> None:
    assert Module(3, extra="yes").hparams == {"width": 3, "extra": "yes"}


def test_methods_of_ones_own_are_told_from_those_of_the_base() -> None:
    assert is_overridden("training_step", Module(2))
    assert not is_overridden("validation_step", Module(2))
    assert not is_overridden("absent", Module(2))


def test_a_trainer_is_refused() -> None:
    with pytest.raises(UsageError, match="has no Trainer"):
        _ = Module(2).trainer
