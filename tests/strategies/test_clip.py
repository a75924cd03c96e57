"""Clipping on plain gradients equals torch's own; sharded ones are compared in the multi tests."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nucleate.errors import ConfigurationError
from nucleate.strategies.clip import clip_by_norm, clip_by_value

pytestmark = pytest.mark.usefixtures("factories_on_device")


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1e6])
def test_norms_and_gradients_equal_those_of_torch(norm_type: float, max_norm: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2).double())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    model[0].bias.grad = None
    reference = copy.deepcopy(model)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        theirs.grad = None if ours.grad is None else ours.grad.clone()
    expected = nn.utils.clip_grad_norm_(reference.parameters(), max_norm, norm_type)
    total = clip_by_norm(model.parameters(), max_norm, norm_type)
    torch.testing.assert_close(total.double(), expected.double())
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_without_gradients_the_norm_is_zero() -> None:
    assert clip_by_norm(nn.Linear(2, 2).parameters(), 1.0) == 0


def test_values_are_limited() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.tensor([[3.0, -3.0], [0.5, float("inf")]])
    clip_by_value(layer.parameters(), 1.0)
    assert layer.weight.grad.tolist() == [[1.0, -1.0], [0.5, 1.0]]


@pytest.mark.parametrize("bound", [-1.0, float("nan")])
def test_bounds_that_make_no_sense_are_refused(bound: float) -> None:
    with pytest.raises(ConfigurationError, match="at least 0"):
        clip_by_norm([], bound)
    with pytest.raises(ConfigurationError, match="at least 0"):
        clip_by_value([], bound)
