"""The short way to the tape leads to the same tape as the long one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nucleate.deferred import deferred
from nucleate.deferred.recording.fast_path import FastPath
from nucleate.materialize import materialize
from tests.deferred.equality import assert_same_model


def steps(make: Callable[[], object]) -> list[Any]:
    torch.manual_seed(5)
    with deferred() as found:
        kept = make()
    fields = ("func", "args", "kwargs", "outputs", "reads", "written", "creates", "overwrites", "uninitialized")
    taken = [[getattr(step, field) for field in fields] for step in found.tape.steps]
    assert kept is not None
    return [taken, torch.rand(3).tolist()]


def plain(taken: list[Any]) -> str:
    return re.sub(r" object at 0x[0-9a-f]+", "", repr(taken))


def fills() -> list[torch.Tensor]:
    made: list[torch.Tensor] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for shape in ((3, 4), (20,), (), (0, 2)):
            tensor = torch.empty(shape, dtype=dtype)
            for _ in range(2):
                tensor.normal_(0, 0.5)
                tensor.uniform_(-1, 1)
                tensor.zero_()
                tensor.fill_(2)
            made.append(tensor)
    whole = torch.zeros(6, 8)
    whole[2:4].normal_()
    whole.t().uniform_()
    whole[:, 1].fill_(3.5)
    generator = torch.Generator().manual_seed(3)
    whole.normal_(generator=generator)
    whole.view(-1)[5:].normal_(1.0, 2.0)
    numbers = torch.ones(4, dtype=torch.int64)
    numbers.fill_(7)
    numbers.zero_()
    return [*made, whole, numbers]


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.Embedding(5, 6), nn.Conv1d(3, 4, 2), nn.LSTM(4, 5))


@pytest.mark.parametrize("make", [fills, layers])
def test_both_ways_leave_the_same_tape_and_stream(make: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    steps(make)  # so that the short way knows the numbers
    quick = steps(make)
    monkeypatch.setattr(FastPath, "record_fill", lambda *args: False)
    monkeypatch.setattr(FastPath, "record_factory", lambda *args: None)
    assert plain(quick) == plain(steps(make))


def test_the_short_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    layers()
    taken: list[bool] = []
    plain = FastPath.record_fill
    monkeypatch.setattr(FastPath, "record_fill", lambda *args: taken.append(plain(*args)) or taken[-1])
    steps(layers)
    steps(layers)
    assert sum(taken) > 15


def test_a_fill_of_nothing_teaches_nothing() -> None:
    with deferred():
        torch.zeros(0, 3, dtype=torch.int64).normal_()
    with deferred():
        with pytest.raises(NotImplementedError):
            nn.init.normal_(torch.zeros(17, dtype=torch.int64))
        with pytest.raises(RuntimeError, match="std"):
            torch.zeros(17).normal_(0, -1)
    with deferred():
        torch.zeros(3).uniform_()


@pytest.mark.parametrize("fill", [lambda t: t.normal_(0, -1), lambda t: t.uniform_(2, 1), lambda t: t.fill_("a")])
def test_what_eager_refuses_is_refused_at_once_every_time(fill: Callable[[torch.Tensor], object]) -> None:
    for _ in range(2):
        with pytest.raises((RuntimeError, TypeError)):
            fill(torch.zeros(4))
        with deferred():
            tensor = torch.zeros(4)
            with pytest.raises((RuntimeError, TypeError)):
                fill(tensor)


def test_a_leaf_that_needs_a_gradient_refuses_a_fill() -> None:
    with deferred():
        model = nn.Linear(4, 4)
        with torch.no_grad():
            model.weight.normal_(0, 0.5)
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            model.weight.normal_(0, 0.5)


def test_version_counters_move_as_eagers_do() -> None:
    def versions() -> list[int]:
        tensor = torch.zeros(20)
        found = []
        for fill in (tensor.normal_, tensor.uniform_, tensor.zero_, tensor[3:].normal_, tensor.normal_):
            fill()
            found.append(tensor._version)
        return found

    expected = versions()
    with deferred():
        versions()
        assert versions() == expected


def test_expanded_and_negated_tensors_take_the_long_way() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Module()
        numbers = torch.zeros(4, dtype=torch.complex64)
        torch.conj(numbers).imag.fill_(2.0)
        model.register_buffer("numbers", numbers)
        return model

    with deferred():
        torch.zeros(3).fill_(2.0)
        model = make()
        with pytest.raises(RuntimeError, match="more than one element"):
            torch.zeros(1).expand(3).normal_()
    assert_same_model(make(), materialize(model))
