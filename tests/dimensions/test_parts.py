"""A model without a forward has parts: the outermost modules that can be called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from nucleate.dimensions.parts import has_forward, parts_of
from nucleate.dimensions.sharding.sharded_class import make_root


class Namespace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.inner = nn.ModuleDict({"second": nn.Sequential(nn.Linear(2, 2)), "third": nn.ReLU()})
        self.weights = nn.ParameterList()


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in parts_of(model)]


def test_a_model_with_a_forward_has_no_parts() -> None:
    assert names(nn.Sequential(nn.Linear(2, 2))) == []

    class Assigned(Namespace):
        def __init__(self) -> None:
            super().__init__()
            self.forward = self.first.forward

    assert names(Assigned()) == []


def test_parts_are_the_outermost_modules_with_a_forward() -> None:
    assert names(Namespace()) == ["first", "inner.second", "inner.third"]
    assert names(nn.ModuleList([nn.Linear(2, 2), nn.ModuleList([nn.ReLU()])])) == ["0", "1.0"]
    assert names(nn.ParameterDict()) == []


def test_a_module_in_two_places_is_one_part() -> None:
    layer = nn.Linear(2, 2)
    outer = nn.Sequential(layer)
    assert names(nn.ModuleList([layer, layer])) == ["0"]
    assert sorted(names(nn.ModuleDict({"a": outer, "b": layer}))) == ["a", "b"]
    assert sorted(names(nn.ModuleDict({"b": layer, "a": outer}))) == ["a", "b"]


def test_a_container_that_became_a_root_still_has_no_forward() -> None:
    class Called(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    make_root(model)
    assert type(model).forward is not nn.Module.forward
    assert not has_forward(model)
    assert type(model).__name__ == "ModuleDict"
    assert isinstance(model, nn.ModuleDict)
    for other in (Called(), Namespace(), nn.ParameterList()):
        cls = type(other)
        make_root(other)
        assert type(other) is cls


@pytest.mark.parametrize("shell", [checkpoint_wrapper, lambda module: torch.compile(module, backend="eager")])
def test_a_part_in_a_shell_is_a_part_and_a_container_in_a_shell_has_none(shell: Any) -> None:
    model = nn.ModuleDict({"actor": shell(nn.Linear(2, 2)), "heads": shell(nn.ModuleList([nn.Linear(2, 1)]))})
    assert not has_forward(model["heads"])
    assert [(name, part) for name, part in parts_of(model)] == [
        ("actor", model["actor"]),
        ("heads.0", next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0]),
    ]
    plain = nn.ModuleDict({"actor": nn.Linear(2, 2)})
    assert parts_of(shell(plain)) == [("actor", plain["actor"])]
