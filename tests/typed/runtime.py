"""The types of `Runtime`. mypy checks this file, and nothing runs it."""

from __future__ import annotations

from typing import Any, assert_type

from torch import nn
from torch.optim import Optimizer

from nucleate import Runtime
from nucleate.wrappers import ModuleWrapper, OptimizerWrapper


def setup(runtime: Runtime, model: nn.Module, optimizer: Optimizer, others: list[Optimizer]) -> None:
    assert_type(runtime.setup(model), ModuleWrapper)
    assert_type(runtime.setup(model, optimizer), tuple[ModuleWrapper, OptimizerWrapper])
    assert_type(runtime.setup(model, optimizer, optimizer), tuple[ModuleWrapper, OptimizerWrapper, OptimizerWrapper])
    assert_type(runtime.setup(model, *others), Any)
    assert_type(runtime.setup_module(model), ModuleWrapper)


def launch(runtime: Runtime) -> None:
    def main(runtime: Runtime, steps: int) -> str:
        return f"{runtime} {steps}"

    assert_type(runtime.launch(main, 3), str)
