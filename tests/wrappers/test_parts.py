"""The parts of a model without a forward go through its precision, by whatever name they are called."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nucleate import Runtime
from tests.device import ACCELERATOR

pytestmark = pytest.mark.usefixtures("factories_on_device")


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.seen = x.dtype
        return self.layer(x) * scale


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = Part(), Part()

    def both(self, x: Tensor) -> Tensor:
        between = self.actor(x)
        self.between = between.dtype
        return self.critic(between)


def setup(model: nn.Module, precision: str = "bf16-true") -> Any:
    return Runtime(accelerator=ACCELERATOR, strategy="single_device", precision=precision).setup(model)


def ones() -> Tensor:
    return torch.ones(1, 2)


def test_parts_are_converted_however_they_are_reached() -> None:
    model = setup(nn.ModuleDict({"actor": Part(), "more": nn.ModuleList([Part()])}))
    for part in (model.actor, model.module["actor"], dict(model.items())["actor"], model.more[0]):
        assert part(ones(), scale=2.0).dtype == torch.float32
        assert part.seen == torch.bfloat16


def test_inside_of_a_marked_method_parts_are_not_converted_again() -> None:
    model = setup(Agent())
    assert model.both(ones()).dtype == torch.float32
    assert model.between == torch.float32
    model.mark_forward_method("both")
    assert model.both(ones()).dtype == torch.float32
    assert model.between == torch.bfloat16
    assert model.critic.seen == torch.bfloat16


def test_a_scaled_loss_of_a_part_needs_the_runtime() -> None:
    model = setup(Agent(), "16-mixed" if ACCELERATOR != "cpu" else "bf16-mixed")
    output = model.actor(ones())
    assert output.dtype == torch.float32
    assert model.actor.layer.weight.dtype == torch.float32


def test_the_signature_of_a_part_stays() -> None:
    model = setup(Agent())
    assert list(inspect.signature(model.actor.forward).parameters) == ["x", "scale"]


def test_a_model_with_a_forward_keeps_the_forwards_of_its_modules() -> None:
    model = setup(nn.Sequential(Part(), Part()))
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_forward_that_a_part_has_of_its_own_is_called() -> None:
    agent = Agent()
    agent.actor.forward = lambda x: x * 7  # type: ignore[method-assign]
    model = setup(agent)
    assert torch.equal(model.actor(ones()), ones() * 7)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_run_their_own_parts(way: Any) -> None:
    model = setup(Agent())
    for twin in (way(model), way(model.module)):
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(twin.actor(ones()), torch.zeros(1, 2))
        assert twin.actor(ones()).dtype == torch.float32
        assert not torch.equal(model.actor(ones()), torch.zeros(1, 2))


def test_a_copy_of_a_part_does_not_copy_the_model() -> None:
    model = setup(Agent())
    part = copy.deepcopy(model.actor)
    assert vars(part)["forward"]._wrapper is model
    assert part(ones()).dtype == torch.float32
    with torch.no_grad():
        part.layer.weight.zero_()
        part.layer.bias.zero_()
    assert torch.equal(part(ones()), torch.zeros(1, 2))
