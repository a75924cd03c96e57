"""Jumping in the CPU generator's stream leads where drawing leads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nucleate.deferred.randomness import mersenne_twister
from nucleate.deferred.randomness.mersenne_twister import JUMP_COST, Stream, Workspace, draw, jump, jumps_as_it_draws

# Blocks of 624, and the 31 blocks below which no polynomial is needed.
DISTANCES = [0, 1, 623, 624, 625, 1247, 1248, 31 * 624, 32 * 624 - 1, 32 * 624, 33 * 624 + 1, 1_234_567]


def state_after(seed: int, before: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draw(generator, before)
    return generator.get_state()


def drawn(state: Tensor, count: int) -> Tensor:
    generator = torch.Generator()
    generator.set_state(state)
    draw(generator, count)
    return generator.get_state()


def test_this_build_of_torch_has_the_generator_that_is_jumped_in() -> None:
    assert jumps_as_it_draws()


@pytest.mark.parametrize("before", [0, 1, 623, 624, 625, 5000])
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_jump_gives_the_state_that_drawing_gives_byte_for_byte(before: int, distance: int) -> None:
    state = state_after(7, before)
    assert torch.equal(jump(state, distance), drawn(state, distance))


@given(st.integers(0, 2**63 - 1), st.integers(0, 2000), st.integers(0, 300_000))
@settings(max_examples=60, deadline=None)
def test_any_jump_gives_the_state_that_drawing_gives(seed: int, before: int, distance: int) -> None:
    state = state_after(seed, before)
    assert torch.equal(jump(state, distance), drawn(state, distance))


@given(st.integers(0, 2**45), st.integers(0, 2**45))
@settings(max_examples=25, deadline=None)
def test_far_jumps_add_up(first: int, second: int) -> None:
    state = state_after(3, 100)
    assert torch.equal(jump(jump(state, first), second), jump(state, first + second))


def test_a_cached_gaussian_stays_in_the_state() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.empty(3).normal_(generator=generator)
    state = generator.get_state()
    generator.set_state(jump(state, 100_000))
    twin = torch.Generator()
    twin.set_state(drawn(state, 100_000))
    assert torch.equal(torch.empty(3).normal_(generator=generator), torch.empty(3).normal_(generator=twin))


def test_memory_for_jumps_can_be_used_again() -> None:
    state, workspace = state_after(1, 9), Workspace()
    for distance in (900_000, 123_456, 5_000_000, 900_000):
        assert torch.equal(jump(state, distance, workspace), jump(state, distance))


def test_a_stream_goes_forward_by_draws_and_jumps_and_never_back() -> None:
    state = state_after(5, 0)
    stream = Stream(state, 100)
    for offset in (100, 101, 900, 100 + JUMP_COST, 3 * JUMP_COST + 7):
        stream.seek(offset, Workspace())
        assert torch.equal(stream.generator.get_state(), drawn(state, offset - 100))
    with pytest.raises(ValueError, match="cannot go back"):
        stream.seek(5, Workspace())


def test_a_build_with_another_generator_is_followed_by_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mersenne_twister, "jumps_as_it_draws", lambda: False)
    monkeypatch.setattr(mersenne_twister, "jump", None)
    stream = Stream(state_after(5, 0), 0)
    stream.seek(3 * JUMP_COST, Workspace())
    assert torch.equal(stream.generator.get_state(), drawn(state_after(5, 0), 3 * JUMP_COST))
