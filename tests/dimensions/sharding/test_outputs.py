"""The tensors in an output that FSDP does not find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from nucleate.dimensions.sharding.outputs import hidden_tensors, tensors_for_fsdp

pytestmark = pytest.mark.usefixtures("factories_on_device")


class Plain:
    def __init__(self, *values: Any) -> None:
        self.values = values


class Slotted:
    __slots__ = ("missing", "value")

    def __init__(self, value: Any) -> None:
        self.value = value


@dataclass
class Data:
    value: Any


def tensor() -> torch.Tensor:
    return torch.ones(2, requires_grad=True) * 2


@pytest.mark.parametrize("around", [Plain, Slotted, lambda x: {x}, lambda x: Data(Plain([Slotted({"a": x})]))])
def test_tensors_in_other_objects_are_found(around: Any) -> None:
    value = tensor()
    assert tensors_for_fsdp(around(value)) == ()
    assert [id(found) for found in hidden_tensors(around(value))] == [id(value)]
    assert hidden_tensors(around(value.detach())) == []


@pytest.mark.parametrize("around", [lambda x: x, lambda x: [x, Plain(x)], lambda x: {"a": (x,)}, Data])
def test_where_fsdp_finds_a_tensor_nothing_is_hidden(around: Any) -> None:
    assert hidden_tensors(around(tensor())) == []


def test_a_circle_ends_and_what_is_no_output_is_left_out() -> None:
    value, circle = tensor(), Plain()
    circle.values = (circle, value, value, None, 3, "text", nn.Linear(2, 2), nn.Linear, torch, lambda: value)
    assert [id(found) for found in hidden_tensors(circle)] == [id(value)]
