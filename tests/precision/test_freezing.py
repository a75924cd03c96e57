"""The layers that a precision may freeze."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from nucleate.precision import layers_to_freeze


def layers(*frozen: bool) -> list[tuple[str, nn.Linear]]:
    found = []
    for number, is_frozen in enumerate(frozen):
        linear = nn.Linear(2, 2)
        linear.weight.requires_grad_(not is_frozen)
        found.append((f"layers.{number}", linear))
    return found


def names(found: Sequence[tuple[str, nn.Module]]) -> list[str]:
    return [fqn for fqn, _ in found]


def test_beside_frozen_layers_those_that_train_are_left_out() -> None:
    assert names(layers_to_freeze(layers(True, False, True), precision="mine")) == ["layers.0", "layers.2"]
    assert names(layers_to_freeze(iter(layers(True, True)), precision="mine")) == ["layers.0", "layers.1"]


def test_where_nothing_is_frozen_all_are_taken_and_a_warning_says_so() -> None:
    found = layers(*[False] * 12)
    with pytest.warns(UserWarning, match=r"precision 'mine' converts the weights of 12 layers and freezes") as seen:
        assert layers_to_freeze(found, precision="mine", advice="`skip` names others.") == found
    [warning] = seen
    text = str(warning.message)
    assert "layers.0, layers.1, layers.2, ... (12 in all)" in text
    assert "`requires_grad_(False)`" in text
    assert text.endswith("`skip` names others.")
    with pytest.warns(UserWarning, match=r"of 1 layer and .* before: the model\."):
        layers_to_freeze([("", nn.Linear(2, 2))], precision="mine")


@pytest.mark.parametrize(
    ("found", "options"),
    [
        (layers(False, False), {}),
        ([], {"precision": "mine"}),
        (layers(True), {"precision": "mine"}),
        (layers(True, False), {"precision": "mine"}),
        (layers(False), {"precision": "mine", "has_frozen": True}),
    ],
)
def test_otherwise_there_is_no_warning(found: list[tuple[str, nn.Linear]], options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layers_to_freeze(found, **options)


def test_only_the_first_rank_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(layers_to_freeze(layers(False, False), precision="mine")) == 2
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.warns(UserWarning, match="'mine'"):
        layers_to_freeze(layers(False, False), precision="mine")


def test_layers_that_are_converted_already_count_as_frozen() -> None:
    assert layers_to_freeze(layers(False, False), has_frozen=True) == []
    assert names(layers_to_freeze(layers(False, True), has_frozen=True)) == ["layers.1"]


def test_a_bias_may_train() -> None:
    linear, adapter = nn.Linear(2, 2), nn.Linear(2, 2)
    linear.weight.requires_grad_(False)
    assert names(layers_to_freeze([("a", linear), ("b", adapter)])) == ["a"]
