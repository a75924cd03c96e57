"""Parts that go to a device are cut into batches that fill one staging buffer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nucleate.deferred.replay.ranges import RangeMaker
from nucleate.devices.staging import ALIGNMENT
from nucleate.materialize.making import _batches
from nucleate.materialize.parts import Columns, Part, Range
from tests.deferred.test_given import held

pytestmark = pytest.mark.usefixtures("factories_on_device")


def range_of(numel: int, grain: int = 1) -> Range:
    maker = RangeMaker.of(held(numel), torch.float32)
    maker.grain = grain
    return Range(maker, 0, torch.empty(numel, device="meta"))


def columns_of(num_rows: int, width: int) -> Columns:
    maker = RangeMaker.of(held(num_rows, width), torch.float32)
    return Columns(maker, 0, torch.empty(num_rows, 3, device="meta"), width, 1)


sizes = st.lists(st.tuples(st.integers(1, 3000), st.sampled_from([0, 5, 40]), st.sampled_from([1, 100])), max_size=9)


@given(sizes=sizes, limit=st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_batches_hold_every_row_once_in_order_and_fit(sizes: list[tuple[int, int, int]], limit: int) -> None:
    parts: list[Part] = [columns_of(n, width) if width else range_of(n, grain) for n, width, grain in sizes]
    found: list[tuple[int, int, int]] = []
    for batch in _batches(parts, limit * ALIGNMENT):
        end = 0
        for part, place in batch:
            assert place >= end
            assert place % ALIGNMENT == 0
            end = place + part.num_rows * part.row_bytes
            assert end <= limit * ALIGNMENT
            number = next(number for number, whole in enumerate(parts) if whole.maker is part.maker)
            found.append((number, part.start // part.row_numel, part.num_rows))
    done: dict[int, int] = {}
    for number, start, rows in found:
        assert start == done.get(number, 0)
        done[number] = start + rows
    assert [number for number, _, _ in found] == sorted(number for number, _, _ in found)
    assert done == {number: part.num_rows for number, part in enumerate(parts)}


def lengths(parts: list[Part], limit: int) -> list[list[int]]:
    return [[part.num_rows for part, _ in batch] for batch in _batches(parts, limit)]


def test_small_parts_share_a_batch_and_a_large_one_fills_what_is_left() -> None:
    assert lengths([range_of(10), range_of(100), range_of(2000)], 4096) == [[10, 100, 896], [1024], [80]]


def test_a_file_that_is_read_in_long_runs_is_not_cut_short_for_the_rest_of_a_buffer() -> None:
    assert lengths([range_of(600), range_of(2000, grain=900)], 4096) == [[600], [1024], [976]]


def test_host_memory_takes_the_place_of_what_is_sent() -> None:
    (batch,) = _batches([range_of(100)], 4096)
    memory: Tensor = torch.empty(100)
    part = batch[0][0].on_host(memory)
    assert isinstance(part, Range)
    assert part.out.data_ptr() == memory.data_ptr()
