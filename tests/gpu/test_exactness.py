"""On CUDA, deferred construction is eager construction under `torch.device("cuda")`, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nucleate.deferred import deferred
from nucleate.devices import philox
from nucleate.materialize import materialize
from tests.deferred.equality import assert_same_model
from tests.zoo import ZOO

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_normal", [True, False], ids=["normal", "uniform"])
def test_a_fill_adds_to_the_offset_what_is_said(is_normal: bool, dtype: torch.dtype) -> None:
    assert philox.adds_as_described(is_normal, dtype, torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("name", ZOO)
def test_models_are_eagers(name: str) -> None:
    make = ZOO[name][0]
    torch.cuda.manual_seed(3)
    torch.manual_seed(3)
    with torch.device("cuda"):
        eager = make()
    expected = torch.rand(5, device="cuda"), torch.rand(5)
    torch.manual_seed(3)
    with torch.device("cuda"), deferred("cuda"):
        model = make()
    assert torch.equal(torch.rand(5, device="cuda"), expected[0])
    assert torch.equal(torch.rand(5), expected[1])
    materialize(model, device="cuda")
    assert_same_model(eager.cpu(), model.cpu())


def test_a_write_that_a_later_one_covers_is_passed_over_by_an_addition(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> nn.Module:
        layer = nn.Linear(2000, 1000)
        nn.init.normal_(layer.weight)
        return layer

    torch.cuda.manual_seed(1)
    with torch.device("cuda"):
        eager = make()
    torch.cuda.manual_seed(1)
    with torch.device("cuda"), deferred("cuda"):
        model = make()

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the first fill of the weight was executed to find the state behind it")

    monkeypatch.setattr("nucleate.deferred.replay.Replayer.behind", refuse)
    materialize(model, device="cuda")
    assert torch.equal(eager.weight, model.weight)
    assert torch.equal(eager.bias, model.bias)


def test_no_more_than_the_final_bytes_and_one_parameter_are_taken() -> None:
    with torch.device("cuda"), deferred("cuda"):
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    materialize(model, device="cuda")
    assert torch.cuda.max_memory_allocated() - base <= 16 * 4 * 2**20 + 4 * 2**20
