"""The types of `Runtime`. mypy checks this file, and nothing runs it."""

from __future__ import annotations

from typing import Any, assert_type

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nucleate import Runtime
from nucleate.wrappers import ModuleWrapper, OptimizerWrapper


def setup(
    runtime: Runtime, model: nn.Module, optimizer: Optimizer, others: list[Optimizer], scheduler: LRScheduler
) -> None:
    assert_type(runtime.setup(model), ModuleWrapper)
    assert_type(runtime.setup(model, optimizer), tuple[ModuleWrapper, OptimizerWrapper])
    assert_type(runtime.setup(model, optimizer, optimizer), tuple[ModuleWrapper, OptimizerWrapper, OptimizerWrapper])
    assert_type(runtime.setup(model, *others), Any)
    assert_type(runtime.setup(model, move_to_device=False), ModuleWrapper)
    assert_type(runtime.setup(model, optimizer, scheduler=scheduler), Any)
    assert_type(runtime.setup_module(model, move_to_device=False), ModuleWrapper)


def launch(runtime: Runtime) -> None:
    def main(runtime: Runtime, steps: int) -> str:
        return f"{runtime} {steps}"

    assert_type(runtime.launch(main, 3), str)
