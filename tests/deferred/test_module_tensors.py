"""The search for the tensors that a module holds outside of its registries."""

from __future__ import annotations

import weakref
from collections import deque
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nucleate.deferred import deferred, held_tensors
from nucleate.materialize import materialize


def deferred_layer() -> nn.Module:
    with deferred():
        return nn.Linear(2, 2)


def test_an_object_may_lead_to_a_tensor_through_any_number_of_others() -> None:
    layer = deferred_layer()
    end = layer.chain = SimpleNamespace()
    for _ in range(5000):
        end.next = SimpleNamespace()
        end = end.next
    end.tensor = layer.weight
    assert [(kind, name) for kind, name, _ in held_tensors(layer)][-1] == ("attribute", "chain")
    materialize(layer)
    assert end.tensor is layer.weight


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensor: [tensor],
        lambda tensor: ({"a": {1: tensor}},),
        lambda tensor: deque([tensor]),
        lambda tensor: partial(print, tensor, end=""),
        lambda tensor: lambda: tensor,
        lambda tensor: MethodType(print, [tensor]),
        lambda tensor: SimpleNamespace(a=[SimpleNamespace(b=tensor)]),
    ],
)
def test_tensors_are_found_inside(wrap: Any) -> None:
    layer = nn.Linear(2, 2)
    tensor = torch.ones(3)
    layer.held = wrap(tensor)
    assert [found for kind, _, found in held_tensors(layer) if kind == "attribute" and found is tensor] == [tensor]


def test_objects_that_lead_back_to_each_other_are_searched_once() -> None:
    layer = deferred_layer()
    first, second = SimpleNamespace(tensor=layer.bias), SimpleNamespace()
    first.other, second.other, second.layer = second, first, layer
    layer.first, layer.pair = first, [first, second]
    assert [name for kind, name, _ in held_tensors(layer) if kind == "attribute"] == ["first", "pair"]
    materialize(layer)
    assert first.tensor is layer.bias


class Owner:
    def __init__(self) -> None:
        self.tensor = torch.ones(1)


def test_weak_proxies_are_followed_and_dead_ones_are_passed_over() -> None:
    layer, owner = deferred_layer(), Owner()
    layer.owner, layer.itself = weakref.proxy(owner), weakref.proxy(layer)
    assert [name for kind, name, _ in held_tensors(layer) if kind == "attribute"] == ["owner"]
    del owner
    materialize(layer)
    assert layer.bias.isfinite().all()
