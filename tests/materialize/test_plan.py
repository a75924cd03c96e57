"""Plans: what identifies a model on all ranks, and that what gets no value stays deferred."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from nucleate.deferred import deferred, handle_of
from nucleate.errors import DeferredUseError
from nucleate.materialize import Plan, materialize
from tests.deferred.equality import assert_same_model
from tests.device import device

pytestmark = pytest.mark.usefixtures("factories_on_device")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(30, 30)
        nn.init.trunc_normal_(self.first.weight)
        self.second = nn.Linear(30, 30)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.randn(3).cumsum(0))


def digest(then: Callable[[nn.Module], object] = lambda model: None, seed: int = 0) -> str:
    torch.manual_seed(seed)
    with deferred(device()):
        model = Net()
    then(model)
    return Plan.of(model).digest()


def another_model(model: nn.Module) -> None:
    with deferred(device()):
        other = nn.Linear(30, 30)
        other.weight.data.copy_(model.first.weight)


ON_ONE_RANK: dict[str, Callable[[nn.Module], object]] = {
    "a copy": copy.deepcopy,
    "a look": lambda m: m.first.weight.data.t().half(),
    "another model": another_model,
}


@pytest.mark.parametrize("then", ON_ONE_RANK.values(), ids=ON_ONE_RANK.keys())
@pytest.mark.parametrize("cast", [False, True])
def test_what_one_rank_makes_besides_does_not_show_in_the_digest(
    then: Callable[[nn.Module], object], cast: bool
) -> None:
    def both(model: nn.Module) -> None:
        if cast:
            model.half()

    def one(model: nn.Module) -> None:
        kept.append(then(model))
        both(model)

    kept: list[object] = []
    assert digest(one) == digest(both)
    assert digest(one) != digest(both, seed=1)


def edit(model: nn.Module) -> None:
    with deferred(device()):
        model.table.add_(1)


def draw(model: nn.Module) -> None:
    with deferred(device()):
        torch.rand(5)
        model.table.uniform_()


def draw_more(model: nn.Module) -> None:
    with deferred(device()):
        torch.rand(6)
        model.table.uniform_()


OTHER: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda m: None,
    "cast": lambda m: m.half(),
    "part": lambda m: m.second.half(),
    "tie": lambda m: setattr(m.second, "bias", m.first.bias),
    "untie": lambda m: setattr(m.second, "weight", copy.deepcopy(m.first.weight)),
    "edit": edit,
    "draw": draw,
    "draw more": draw_more,
}


def test_what_changes_the_model_shows_in_the_digest() -> None:
    digests = [digest(then) for then in OTHER.values()]
    assert len(set(digests)) == len(digests)


def test_restore_puts_the_guards_back_on_what_has_no_value() -> None:
    torch.manual_seed(0)
    expected = Net()
    torch.manual_seed(0)
    with deferred(device()):
        model = Net()
    plan = Plan.of(model)
    plan.release()
    assert handle_of(model.first.weight) is None
    plan.restore()
    with pytest.raises(DeferredUseError, match=r"first\.weight"):
        model.first(torch.ones(30))
    materialize(model, device())
    plan.restore()
    assert type(model.first.weight) is nn.Parameter
    assert_same_model(expected, model)
