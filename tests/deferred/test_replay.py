"""A replay runs what a value depends on, and nothing else."""

from __future__ import annotations

import torch
from torch import nn

from nucleate.deferred import deferred
from nucleate.deferred.replay.replayer import backward_slice


def _names(model: nn.Module, record: object, tensor: torch.Tensor) -> list[str]:
    tape = record.tape  # type: ignore[attr-defined]
    steps = backward_slice(tape, [tape.number(tensor)])
    return [step.func.overloadpacket.__name__ for step in steps]


def test_writes_that_a_later_full_overwrite_makes_dead_are_left_out() -> None:
    with deferred() as record:
        layer = nn.Linear(6, 6)
        layer.weight.data.normal_()
        nn.init.zeros_(layer.weight)
        nn.init.normal_(layer.weight)
    assert _names(layer, record, layer.weight) == ["normal_"]


def test_a_write_that_looks_at_the_old_value_keeps_what_was_before() -> None:
    with deferred() as record:
        weight = nn.Parameter(torch.empty(4))
        with torch.no_grad():
            weight.normal_().mul_(2)
            weight[:2].zero_()
    assert _names(nn.Module(), record, weight) == ["normal_", "mul_", "zero_"]


def test_other_parameters_are_not_part_of_a_slice() -> None:
    with deferred() as record:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        with torch.no_grad():
            model[1].bias.copy_(model[0].bias)
    assert _names(model, record, model[1].weight) == ["uniform_"]
    assert _names(model, record, model[1].bias) == ["uniform_", "copy_"]


def test_a_copy_of_itself_is_not_an_overwrite() -> None:
    with deferred() as record:
        weight = nn.Parameter(torch.randn(4, 4))
        with torch.no_grad():
            weight.copy_(weight.t().clone())
            weight.copy_(weight * 2)
    assert _names(nn.Module(), record, weight) == ["randn", "clone", "copy_", "mul", "copy_"]
