"""Ranges of views are read as torch's own views have them, in long runs and through little memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nucleate.deferred.replay import strided
from nucleate.deferred.replay.strided import boxes, coalesced, composed, read_strided


class Ranges:
    """Reads ranges of a flat tensor and counts them."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self.sizes: list[int] = []

    def __call__(self, start: int, out: Tensor) -> None:
        assert out.is_contiguous()
        assert start >= 0
        assert start + out.numel() <= self.flat.numel()
        self.sizes.append(out.numel())
        out.copy_(self.flat[start : start + out.numel()])


@st.composite
def views(draw: Any) -> tuple[Tensor, Tensor]:
    """Return a contiguous tensor and a view of it."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    view = whole
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["permute", "narrow", "expand", "split", "select"]))
        if kind == "permute":
            view = view.permute(draw(st.permutations(range(view.dim()))))
        elif kind == "narrow" and view.dim():
            dim = draw(st.integers(0, view.dim() - 1))
            start = draw(st.integers(0, view.shape[dim] - 1))
            view = view.narrow(dim, start, draw(st.integers(1, view.shape[dim] - start)))
        elif kind == "expand":
            view = view.unsqueeze(0).expand(draw(st.integers(1, 3)), *view.shape)
        elif kind == "split" and view.dim():
            dim = draw(st.integers(0, view.dim() - 1))
            parts = [n for n in range(1, view.shape[dim] + 1) if view.shape[dim] % n == 0]
            view = view.unflatten(dim, (draw(st.sampled_from(parts)), -1))
        elif kind == "select" and view.dim() > 1:
            view = view.select(0, draw(st.integers(0, view.shape[0] - 1)))
    return whole.view(-1), view


@given(views(), st.data())
@settings(max_examples=300, deadline=None)
@pytest.mark.parametrize("tile_bytes", [8, 64, strided.TILE_BYTES])
def test_any_range_of_any_view_is_torchs(tile_bytes: int, pair: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    flat, view = pair
    start = data.draw(st.integers(0, view.numel()))
    stop = data.draw(st.integers(start, view.numel()))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    out = torch.full((stop - start,), -1, dtype=dtype)
    read = Ranges(flat)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strided, "TILE_BYTES", tile_bytes)
        read_strided(read, torch.float32, view.storage_offset(), view.shape, view.stride(), start, out)
    assert torch.equal(out, view.reshape(-1)[start:stop].to(dtype))


@given(views(), st.data())
@settings(max_examples=200, deadline=None)
def test_rows_go_into_a_wider_tensor(pair: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    flat, view = pair
    dim = data.draw(st.integers(0, view.dim()))
    columns = math.prod(view.shape[dim:])
    rows = view.numel() // columns
    first = data.draw(st.integers(0, rows - 1))
    wide = torch.full((rows - first, columns + 3), -1.0)
    size, stride = coalesced(view.shape, view.stride()) if data.draw(st.booleans()) else (view.shape, view.stride())
    read_strided(
        Ranges(flat), torch.float32, view.storage_offset(), size, stride, first * columns, wide[:, 2 : 2 + columns]
    )
    assert torch.equal(wide[:, 2 : 2 + columns], view.reshape(rows, columns)[first:])
    assert (wide[:, :2] == -1).all()
    assert (wide[:, -1] == -1).all()


@given(views(), st.data())
@settings(max_examples=300, deadline=None)
def test_a_view_of_a_copy_of_a_view_is_one_view_or_none(pair: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    flat, inner = pair
    copy = inner.contiguous()
    outer = copy.permute(data.draw(st.permutations(range(copy.dim()))))
    if outer.dim():
        start = data.draw(st.integers(0, outer.shape[0] - 1))
        outer = outer[start : data.draw(st.integers(start + 1, outer.shape[0]))]
    offset = outer.storage_offset() if outer._base is not None or outer is copy else 0
    found = composed(offset - copy.storage_offset(), outer.shape, outer.stride(), inner.shape, inner.stride())
    if found is not None:
        start, size, stride = found
        one = flat.as_strided(size, stride, inner.storage_offset() + start)
        assert torch.equal(one.reshape(-1), outer.reshape(-1))


def test_a_transposition_of_a_transposition_is_found_to_be_none() -> None:
    found = composed(0, (4, 6), (1, 4), (6, 4), (1, 6))
    assert found is not None
    assert (found[0], coalesced(*found[1:])) == (0, ((24,), (1,)))


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_boxes_make_up_a_range_in_order(shape: list[int], data: st.DataObject) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    found = [whole[tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))].reshape(-1)
             for begin, size in boxes(shape, start, stop)]  # fmt: skip
    assert torch.equal(torch.cat([torch.zeros(0, dtype=torch.int64), *found]), torch.arange(start, stop))


def test_a_shard_of_a_transposed_tensor_reads_its_columns_only() -> None:
    whole = torch.arange(300 * 512, dtype=torch.float32)
    view = whole.view(300, 512).t()
    read = Ranges(whole)
    out = torch.empty(256 * 300)
    read_strided(read, torch.float32, 0, view.shape, view.stride(), 256 * 300, out)
    assert torch.equal(out, view[256:].reshape(-1))
    assert sum(read.sizes) == out.numel()
    assert min(read.sizes) == 256


def test_short_runs_are_read_many_at_a_time() -> None:
    whole = torch.arange(3000 * 512, dtype=torch.float32)
    view = whole.view(3000, 512).t()
    read = Ranges(whole)
    out = torch.empty(2 * 3000)
    read_strided(read, torch.float32, 0, view.shape, view.stride(), 0, out)
    assert torch.equal(out, view[:2].reshape(-1))
    assert len(read.sizes) < 110


def test_no_range_is_larger_than_a_tile_however_large_the_tensor() -> None:
    whole = torch.arange(2 * strided.TILE_BYTES, dtype=torch.uint8)
    view = whole.view(1024, -1).t()
    read = Ranges(whole)
    out = torch.empty(whole.numel(), dtype=torch.uint8)
    read_strided(read, torch.uint8, 0, view.shape, view.stride(), 0, out)
    assert torch.equal(out, view.reshape(-1))
    assert max(read.sizes) <= strided.TILE_BYTES
    assert sum(read.sizes) == whole.numel()
