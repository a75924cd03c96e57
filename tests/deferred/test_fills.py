"""Any part of a random fill, made alone, is that part of the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nucleate.deferred import deferred
from nucleate.deferred.randomness.fills import GROUP, Fill, fills_as_described
from nucleate.deferred.randomness.mersenne_twister import draw
from tests.deferred.equality import assert_exact

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def whole(fill: Fill, seed: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """Return a fill made by torch, and the generator's state before and behind it."""
    generator = torch.Generator().manual_seed(seed)
    draw(generator, 77)
    before = generator.get_state()
    tensor = torch.empty(fill.numel, dtype=fill.dtype)
    (tensor.normal_ if fill.is_normal else tensor.uniform_)(fill.first, fill.second, generator=generator)
    return tensor, before, generator.get_state()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_normal", [True, False], ids=["normal", "uniform"])
def test_this_build_of_torch_fills_as_described(is_normal: bool, dtype: torch.dtype) -> None:
    assert fills_as_described(is_normal, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_normal", [True, False], ids=["normal", "uniform"])
@given(numel=st.integers(GROUP, 400), ends=st.tuples(st.integers(0, 400), st.integers(0, 400)))
@settings(max_examples=80, deadline=None)
def test_any_slice_made_alone_is_the_slice_of_the_whole(
    is_normal: bool, dtype: torch.dtype, numel: int, ends: tuple[int, int]
) -> None:
    fill = Fill(is_normal, -0.25, 1.5, numel, dtype)
    expected, before, behind = whole(fill)
    start, stop = sorted(min(end, numel) for end in ends)
    places: list[int] = []

    def seek(offset: int, count: int) -> torch.Generator:
        assert not places or offset >= places[-1], "it went back"
        places.append(offset + count)
        generator = torch.Generator()
        generator.set_state(before)
        draw(generator, offset)
        return generator

    out = torch.full((stop - start,), float("nan"), dtype=dtype)
    fill.make(start, out, seek)
    assert torch.equal(out, expected[start:stop])
    assert all(place <= fill.num_draws for place in places)
    passed = torch.Generator()
    passed.set_state(before)
    draw(passed, fill.num_draws)
    assert torch.equal(passed.get_state(), behind)


def test_a_truncated_fill_without_a_spread_does_what_eager_does() -> None:
    with deferred(), pytest.raises(ZeroDivisionError):
        nn.init.trunc_normal_(torch.empty(50), std=0.0)

    def make() -> nn.Module:
        layer = nn.Linear(20, 20)
        nn.init.trunc_normal_(layer.weight, std=-0.02)
        nn.init.normal_(layer.bias)
        return layer

    assert_exact(make)
