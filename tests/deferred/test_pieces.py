"""Ranges of a storage made alone are the ranges of the storage made whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nucleate.deferred import StreamCursors, deferred, handle_of
from nucleate.deferred.randomness import streams
from nucleate.deferred.record import Record
from nucleate.deferred.replay import live_writes
from nucleate.deferred.replay.ranges import CHUNK_NUMEL, RangeMaker
from nucleate.materialize import materialize
from tests.deferred.equality import assert_exact

ROWS, COLUMNS = 37, 29


def fill_and_scale() -> Tensor:
    return torch.empty(ROWS, COLUMNS).normal_(1, 2).mul_(0.3).add_(1).clamp_(-1, 1)


def drawn_twice() -> Tensor:
    return torch.empty(ROWS, COLUMNS).uniform_(-1, 1).normal_(0, 0.02)


def a_row_set_to_zero() -> Tensor:
    weight = torch.randn(ROWS, COLUMNS)
    weight[3].fill_(0)
    return weight


def rows_filled_one_by_one() -> Tensor:
    weight = torch.empty(ROWS, COLUMNS)
    for index in range(ROWS):
        weight[index].normal_(index)
    return weight


def computed_of_two() -> Tensor:
    return torch.randn(ROWS, COLUMNS) * 0.5 + torch.rand(ROWS, COLUMNS)


def cast_to_half_precision() -> Tensor:
    return torch.randn(ROWS, COLUMNS).to(torch.bfloat16)


def drawn_in_half_precision() -> Tensor:
    return torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16).normal_(0, 0.02)


def copied_from_a_real_tensor() -> Tensor:
    weight = torch.empty(ROWS, COLUMNS)
    weight.copy_(torch.from_numpy(torch.arange(float(ROWS * COLUMNS)).view(ROWS, COLUMNS).numpy()))
    return weight.div_(7)


def a_part_copied_into_another() -> Tensor:
    weight = torch.ones(ROWS, COLUMNS)
    weight[5:9].copy_(torch.randn(4, COLUMNS))
    return weight


def truncated_beyond_reach() -> Tensor:
    return nn.init.trunc_normal_(torch.empty(ROWS, COLUMNS), std=0.02)


def of_an_explicit_generator() -> Tensor:
    generator = torch.Generator().manual_seed(8)
    torch.rand(9, generator=generator)
    return torch.empty(ROWS, COLUMNS).normal_(generator=generator)


def zeros() -> Tensor:
    return torch.zeros(ROWS, COLUMNS)


def filled() -> Tensor:
    return torch.full((ROWS, COLUMNS), 3.5, dtype=torch.float64)


def stacked() -> Tensor:
    return torch.stack([torch.randn(COLUMNS) for _ in range(ROWS)])


def joined_side_by_side() -> Tensor:
    # As the experts of a mixture: gates and values of each one behind another.
    gates = torch.stack([torch.randn(2, COLUMNS) for _ in range(5)])
    values = torch.stack([torch.rand(3, COLUMNS).to(torch.bfloat16).float() for _ in range(5)])
    weight = torch.cat([gates, values, torch.empty(5, 0, COLUMNS)], dim=1).mul_(0.5)
    return torch.cat([weight.view(25, COLUMNS), torch.zeros(12, COLUMNS)])


def stacked_along_the_last_dimension() -> Tensor:
    return torch.stack([torch.randn(ROWS, 1).view(ROWS) for _ in range(COLUMNS)], dim=-1)


BY_PIECES: list[Callable[[], Tensor]] = [
    stacked,
    joined_side_by_side,
    stacked_along_the_last_dimension,
    fill_and_scale,
    drawn_twice,
    a_row_set_to_zero,
    rows_filled_one_by_one,
    computed_of_two,
    cast_to_half_precision,
    drawn_in_half_precision,
    copied_from_a_real_tensor,
    a_part_copied_into_another,
    truncated_beyond_reach,
    of_an_explicit_generator,
    zeros,
    filled,
]


def orthogonal() -> Tensor:
    return nn.init.orthogonal_(torch.empty(ROWS, COLUMNS))


def truncated_within_reach() -> Tensor:
    return nn.init.trunc_normal_(torch.empty(ROWS, COLUMNS), std=1.0, a=-1, b=1)


def normalized_by_its_sum() -> Tensor:
    weight = torch.rand(ROWS, COLUMNS)
    return weight / weight.sum()


def exponential_of_it() -> Tensor:
    # Rounded otherwise at the end of a vectorized loop than within it.
    return torch.randn(ROWS, COLUMNS).exp_()


def transposed() -> Tensor:
    return torch.empty(COLUMNS, ROWS).t().normal_()


def column_set_to_zero() -> Tensor:
    weight = torch.randn(ROWS, COLUMNS)
    weight[:, 2] = 0
    return weight


def used_twice() -> Tensor:
    weight = torch.randn(ROWS, COLUMNS)
    return weight * 0.5 + weight


def cast_to_unsigned() -> Tensor:
    # What becomes of numbers that are too large depends on the instructions.
    weight = torch.zeros(ROWS * COLUMNS, dtype=torch.uint32)
    weight[1:].copy_(torch.empty(ROWS * COLUMNS - 1).normal_(0, 1e10))
    return weight


def clamped_by_a_tensor() -> Tensor:
    weight = torch.randn(ROWS * COLUMNS).mul_(0.0)
    weight[1:].clamp_(min=torch.zeros(ROWS * COLUMNS - 1))
    return weight


def divided_by_zero() -> Tensor:
    return torch.zeros(ROWS, COLUMNS).div_(0.0).to(torch.bfloat16)


def of_a_real_tensor_that_holds_nan() -> Tensor:
    weight = torch.empty(ROWS, COLUMNS)
    weight.copy_(torch.from_numpy(torch.full((ROWS, COLUMNS), float("nan"), dtype=torch.float16).numpy()))
    return weight.mul_(2)


def many_small_writes() -> Tensor:
    weight = torch.empty(ROWS * COLUMNS)
    for index in range(0, ROWS * COLUMNS, 2):
        weight[index : index + 2].uniform_(0, 1)
    return weight


def joined_of_other_layouts() -> Tensor:
    return torch.cat([torch.randn(COLUMNS, 7).t(), torch.randn(COLUMNS, 30).t()])


def joined_with_itself() -> Tensor:
    weight = torch.randn(ROWS, COLUMNS)
    return torch.cat([weight, weight])


WHOLE: list[Callable[[], Tensor]] = [
    joined_of_other_layouts,
    joined_with_itself,
    cast_to_unsigned,
    clamped_by_a_tensor,
    divided_by_zero,
    of_a_real_tensor_that_holds_nan,
    many_small_writes,
    orthogonal,
    truncated_within_reach,
    normalized_by_its_sum,
    exponential_of_it,
    transposed,
    column_set_to_zero,
    used_twice,
]


class Holds(nn.Module):
    def __init__(self, make: Callable[[], Tensor]) -> None:
        super().__init__()
        torch.rand(5)
        weight = make()
        self.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())


def recorded(make: Callable[[], Tensor]) -> tuple[Tensor, RangeMaker | None, Record]:
    """Return what eager construction gives, and how pieces of it are made."""
    torch.manual_seed(4)
    expected = Holds(make).weight.detach()
    torch.manual_seed(4)
    with deferred() as record:
        model = Holds(make)
    handle = handle_of(model.weight)
    assert handle is not None
    number = handle.record.tape.number(model.weight)
    assert number is not None
    return expected, handle.record.maker(number), record


@pytest.mark.parametrize("make", BY_PIECES)
@given(ends=st.lists(st.tuples(st.integers(0, ROWS * COLUMNS), st.integers(0, ROWS * COLUMNS)), max_size=4))
@settings(max_examples=15, deadline=None)
def test_any_range_is_that_of_the_whole(make: Callable[[], Tensor], ends: list[tuple[int, int]]) -> None:
    expected, found, _ = recorded(make)
    assert found is not None, "it is made whole"
    assert (found.numel, found.dtype) == (expected.numel(), expected.dtype)
    cursors = StreamCursors(found.program)
    for start, stop in [(0, found.numel), *map(sorted, ends)]:
        out = torch.full((stop - start,), 99, dtype=found.dtype)
        found.make(start, out, cursors)
        assert torch.equal(out, expected.view(-1)[start:stop])


@pytest.mark.parametrize("make", WHOLE)
def test_what_cannot_be_cut_is_made_whole_and_exactly(make: Callable[[], Tensor]) -> None:
    assert recorded(make)[1] is None
    assert_exact(lambda: Holds(make))


@pytest.mark.parametrize("make", BY_PIECES)
def test_what_can_be_cut_is_made_exactly(make: Callable[[], Tensor]) -> None:
    assert_exact(lambda: Holds(make))


def test_several_chunks_follow_one_another() -> None:
    def make() -> Tensor:
        return torch.empty(3 * CHUNK_NUMEL + 21).normal_().mul_(2)

    expected, found, _ = recorded(make)
    assert found is not None
    out = torch.empty(found.numel - 7)
    found.make(7, out, StreamCursors(found.program))
    assert torch.equal(out, expected[7:])


def test_a_dead_write_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found, _ = recorded(drawn_twice)
    assert found is not None
    assert len(found.writes) == 1


def test_a_build_that_fills_otherwise_is_followed_whole_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (live_writes, streams):
        monkeypatch.setattr(module, "fills_as_described", lambda is_normal, dtype: False)
    monkeypatch.setattr(RangeMaker, "make", None)
    for make in BY_PIECES[:6]:
        assert_exact(lambda make=make: Holds(make))


def test_parts_of_the_stream_are_never_drawn_twice_in_passing(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[int] = []
    real = StreamCursors.seek

    def seek(self: StreamCursors, position: object, offset: int, count: int) -> torch.Generator:
        passed.append(offset)
        return real(self, position, offset, count)  # type: ignore[arg-type]

    monkeypatch.setattr(StreamCursors, "seek", seek)
    with deferred():
        model = nn.Linear(300, 300)
    materialize(model)
    assert passed == sorted(passed[:-1]) + passed[-1:]
