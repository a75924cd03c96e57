"""The generator's true state at any place of the random program, found without drawing while recording."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nucleate.deferred import deferred
from nucleate.deferred.randomness import streams
from nucleate.deferred.randomness.mersenne_twister import JUMP_COST
from nucleate.materialize import materialize
from tests.deferred.equality import assert_exact

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Around every boundary that the kernels and the jumps have.
SIZES = [1, 15, 16, 17, 31, 33, 1000, JUMP_COST, JUMP_COST + 17, 2 * JUMP_COST + 5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fill", ["normal_", "uniform_", "randn", "rand"])
def test_passing_over_a_fill_moves_the_generator_as_the_fill_does(fill: str, size: int, dtype: torch.dtype) -> None:
    def draw() -> torch.Tensor:
        if fill.startswith("rand"):
            return getattr(torch, fill)(size, dtype=dtype)
        return getattr(torch.empty(size, dtype=dtype), fill)()

    torch.manual_seed(0)
    torch.rand(3)
    draw()
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    torch.rand(3)
    with deferred():
        draw()
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_build_that_draws_otherwise_is_followed_by_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    eager = nn.Linear(50, 50)
    expected = torch.get_rng_state()
    monkeypatch.setattr(streams, "fills_as_described", lambda is_normal, dtype: False)
    torch.manual_seed(0)
    with deferred():
        model = nn.Linear(50, 50)
    assert torch.equal(torch.get_rng_state(), expected)
    materialize(model)
    assert torch.equal(model.weight, eager.weight)


def test_the_end_of_a_long_stream_costs_no_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # 400 billion numbers: drawing them would take more than ten minutes.
    with deferred():
        nn.Linear(2**20, 2**18, bias=False)
        model = nn.Linear(2**20, 2**17, bias=False)
        part = nn.Linear(20, 30)
    assert model.weight.numel() == 2**37
    materialize(part)
    assert 0 < float(part.weight.detach().std()) < 1


def test_steps_that_do_not_tell_what_they_draw_are_executed_once_for_the_state_behind_them() -> None:
    def make() -> nn.Module:
        model = nn.Module()
        for index in range(5):
            weight = nn.init.trunc_normal_(torch.empty(40, 10), std=1.0, a=-0.5, b=0.5)
            model.register_parameter(f"weight{index}", nn.Parameter(weight))
            model.register_parameter(f"permuted{index}", nn.Parameter(torch.randperm(50).float()))
        return model

    assert_exact(make)


def test_a_strided_fill_moves_the_generator_as_the_fill_does() -> None:
    torch.manual_seed(0)
    torch.empty(64, 64).t()[::2].normal_()
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    with deferred():
        torch.empty(64, 64).t()[::2].normal_()
    assert torch.equal(torch.get_rng_state(), expected)


def test_reseeding_inside_counts_from_there() -> None:
    with deferred():
        nn.Linear(50, 50)
        torch.manual_seed(11)
        model = nn.Linear(50, 50)
        assert torch.initial_seed() == 11
    after = torch.rand(4)
    torch.manual_seed(11)
    eager = nn.Linear(50, 50)
    assert torch.equal(torch.rand(4), after)
    materialize(model)
    assert torch.equal(eager.weight, model.weight)


def test_a_state_saved_inside_leads_to_the_same_numbers_when_restored_inside() -> None:
    torch.manual_seed(0)
    with deferred():
        torch.randn(100)
        state = torch.get_rng_state()
        first = nn.Linear(9, 9)
        torch.set_rng_state(state)
        second = nn.Linear(9, 9)
    materialize(first)
    materialize(second)
    assert torch.equal(first.weight, second.weight)


def test_an_explicit_generator_stands_where_eager_construction_leaves_it() -> None:
    generator, twin = (torch.Generator().manual_seed(4) for _ in range(2))
    torch.randn(40, generator=twin)
    with deferred():
        torch.randn(40, generator=generator)
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=twin))


def test_a_cached_gaussian_is_part_of_the_state() -> None:
    # Fewer than 16 normals are made in pairs, and the second of a pair waits in the generator.
    torch.manual_seed(0)
    torch.randn(3)
    expected = torch.randn(3)
    torch.manual_seed(0)
    with deferred():
        torch.randn(3)
    assert torch.equal(torch.randn(3), expected)
