"""The arithmetic of placements equals torch's own splitting of lists of indices, for all shapes and orders of axes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from nucleate.layout import Placement, Replicate, Shard
from nucleate.layout.placements import boxes_at, local_shape_at, order_of, spans_at


def chunk(indices: Tensor, parts: int, number: int) -> Tensor:
    """Return a part of `torch.chunk`, which leaves empty parts out."""
    shares = torch.chunk(indices, parts) if len(indices) else ()
    return shares[number] if number < len(shares) else indices[:0]


def positions(spans: list[tuple[int, int]]) -> list[int]:
    return [index for first, number in spans for index in range(first, first + number)]


LENGTHS = [0, 1, 2, 3, 5, 7, 8, 12, 13, 24]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("sizes", [(2, 2), (2, 3), (3, 2), (1, 4), (4, 1)])
def test_two_axes_split_one_dim_from_the_left_or_from_the_right(length: int, sizes: tuple[int, int]) -> None:
    whole = torch.arange(length)
    for coordinate in itertools.product(*map(range, sizes)):
        outer, inner = coordinate
        from_left = spans_at(0, length, sizes, (Shard(0), Shard(0)), coordinate)
        assert positions(from_left) == chunk(chunk(whole, sizes[0], outer), sizes[1], inner).tolist()
        if sizes[1] > 1:
            from_right = spans_at(0, length, sizes, (Shard(0, sizes[1]), Shard(0)), coordinate)
            assert positions(from_right) == chunk(chunk(whole, sizes[1], inner), sizes[0], outer).tolist()


@pytest.mark.parametrize("length", LENGTHS)
def test_an_outer_axis_splits_what_a_fused_inner_one_has_left(length: int) -> None:
    whole = torch.arange(length)
    for outer, inner in itertools.product(range(2), range(2)):
        kept = torch.cat([chunk(chunk(whole, 3, part), 2, inner) for part in range(3)])
        spans = spans_at(0, length, (2, 2), (Shard(0, 2), Shard(0, 3)), (outer, inner))
        assert positions(spans) == chunk(kept, 2, outer).tolist()


@pytest.mark.parametrize("length", LENGTHS)
def test_parts_that_no_axis_makes_are_each_split(length: int) -> None:
    whole = torch.arange(length)
    for number in range(4):
        expected = torch.cat([chunk(chunk(whole, 3, part), 4, number) for part in range(3)])
        assert positions(spans_at(0, length, (4,), (Shard(0, 3),), (number,))) == expected.tolist()


def test_three_axes_split_in_the_order_that_the_split_factors_tell() -> None:
    # Tensor parallel over expert parallel under FSDP: FSDP comes last.
    assert order_of(0, (2, 3, 5), (Shard(0, 15), Shard(0), Shard(0))) == [(1, 1), (2, 1), (0, 1)]
    assert order_of(0, (2, 3, 5), (Shard(0), Shard(0), Shard(0))) == [(0, 1), (1, 1), (2, 1)]
    assert order_of(0, (2, 3, 5), (Shard(0, 15), Shard(0, 5), Shard(0))) == [(2, 1), (1, 1), (0, 1)]
    assert order_of(0, (2, 3, 5), (Shard(0, 5), Shard(1), Shard(0))) == [(2, 1), (0, 1)]
    assert order_of(1, (2, 3, 5), (Shard(0, 5), Shard(1), Shard(0))) == [(1, 1)]
    assert order_of(0, (2, 2), (Shard(0, 2), Shard(0, 3))) == [(1, 3), (0, 1)]


PLACEMENTS: list[tuple[Placement, ...]] = [
    (Replicate(), Shard(0)), (Shard(1), Shard(0)), (Shard(0, 3), Shard(0)), (Shard(0), Shard(0)),
    (Shard(0, 2), Shard(1)), (Replicate(), Replicate()), (Shard(1, 3), Shard(1)), (Shard(2), Replicate()),
]  # fmt: skip


@pytest.mark.parametrize("placements", PLACEMENTS)
@pytest.mark.parametrize("shape", [(7, 5, 3), (1, 2, 9), (12, 6, 4), (0, 3, 2)])
def test_boxes_of_all_ranks_cover_each_element_as_often_as_it_is_held(
    shape: tuple[int, ...], placements: tuple[Placement, ...]
) -> None:
    sizes, counts = (2, 3), torch.zeros(shape, dtype=torch.int64)
    copies = 1
    for placement, size in zip(placements, sizes, strict=True):
        copies *= 1 if isinstance(placement, Shard) else size
    whole = torch.arange(counts.numel()).view(shape)
    for coordinate in itertools.product(*map(range, sizes)):
        local = torch.full(local_shape_at(shape, sizes, placements, coordinate), -1)
        for box in boxes_at(shape, sizes, placements, coordinate):
            box.of_whole(counts).add_(1)
            box.of_local(local).copy_(box.of_whole(whole))
        assert (local >= 0).all()
    assert (counts == copies).all()
