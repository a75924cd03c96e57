"""A deferred model is made in any order, at once or in parts, with the same bits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from nucleate.deferred import deferred
from nucleate.materialize import materialize
from tests.deferred.equality import assert_same_model


class _Model(nn.Module):
    """Layers that share a stream, a table and weights, and that are initialized over and over."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=1)
        self.table = nn.Module()
        self.table.register_buffer("whole", torch.randn(6, 8))
        self.table.register_buffer("part", self.table.whole[2:4])
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
        self.recurrent = nn.LSTM(8, 4, 2)
        self.orthogonal = parametrizations.orthogonal(nn.Linear(8, 8))
        self.normed = nn.utils.spectral_norm(nn.Linear(8, 8))
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight
        for block in self.blocks:
            nn.init.trunc_normal_(block.linear1.weight, std=float(self.embedding.weight.detach().std()))
            with torch.no_grad():
                block.linear2.weight.copy_(block.linear1.weight.t() * 0.5)
        torch.manual_seed(12)
        self.late = nn.Linear(8, 8)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.forked = nn.Linear(8, 8)
        generator = torch.Generator().manual_seed(1)
        self.own = nn.Module()
        self.own.weight = nn.Parameter(torch.randn(5, generator=generator))
        self.own.other = nn.Parameter(self.own.weight.detach().numpy().sum() * torch.rand(3, generator=generator))
        self.last = nn.BatchNorm1d(8)


def _eager() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return _Model(), torch.get_rng_state()


def _deferred() -> nn.Module:
    torch.manual_seed(0)
    with deferred():
        return _Model()


@pytest.mark.parametrize("order", range(8))
def test_submodules_are_made_in_any_order(order: int) -> None:
    expected, _ = _eager()
    model = _deferred()
    parts = [module for module in model.modules() if module is not model]
    random.Random(order).shuffle(parts)
    for part in parts:
        torch.manual_seed(order)
        materialize(part)
    materialize(model)
    assert_same_model(expected, model)


def test_making_a_model_twice_changes_nothing() -> None:
    expected, state = _eager()
    model = _deferred()
    assert torch.equal(torch.get_rng_state(), state)
    materialize(model.blocks[1])
    materialize(model)
    materialize(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_model(expected, model)


def test_two_models_of_one_context_are_made_in_turns() -> None:
    def build() -> list[Any]:
        torch.manual_seed(0)
        return [_Model(), _Model()]

    expected = build()
    with deferred():
        models = build()
    for names in zip(models[0]._modules, reversed(models[1]._modules), strict=True):
        for model, name in zip(models, names, strict=True):
            materialize(getattr(model, name))
    for one, other in zip(expected, models, strict=True):
        materialize(other)
        assert_same_model(one, other)
