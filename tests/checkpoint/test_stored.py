"""Any range and any box of a tensor is read from any boxes that it lies in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nucleate.checkpoint.stored.chunk import Chunk
from nucleate.checkpoint.stored.data_file import DataFile, HeldBytes
from nucleate.checkpoint.stored.tensor import _BUFFER_BYTES, StoredTensor
from nucleate.errors import CheckpointError


def held(tensor: Tensor) -> HeldBytes:
    return HeldBytes("it", tensor.contiguous())


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[Tensor, StoredTensor]:
    """A tensor, and the same in boxes that were cut at random, some of them not row by row."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    tensor = torch.arange(math.prod(shape)).to(torch.int16).view(shape)
    boxes: list[tuple[tuple[int, ...], Tensor]] = [((0,) * len(shape), tensor)]
    for dim in range(len(shape)):
        cut = draw(st.integers(0, shape[dim]))
        if draw(st.booleans()):
            boxes = [
                (tuple(b + at * (d == dim) for d, b in enumerate(begin)), part)
                for begin, box in boxes
                for at, part in ((0, box.narrow(dim, 0, cut)), (cut, box.narrow(dim, cut, shape[dim] - cut)))
            ]
    chunks = []
    for begin, box in draw(st.permutations(boxes)):
        order = draw(st.permutations(range(len(shape))))
        lying = box.permute(order).contiguous()
        stride = [0] * len(shape)
        for place, dim in enumerate(order):
            stride[dim] = lying.stride(place)
        plain = tuple(order) == tuple(range(len(shape)))
        chunks.append(Chunk(held(lying), 0, begin, tuple(box.shape), None if plain else tuple(stride)))
    return tensor, StoredTensor("it", tensor.dtype, shape, tuple(chunks))


@given(laid_out(), st.data())
@settings(deadline=None)
def test_any_range_is_read_from_any_boxes(laid: tuple[Tensor, StoredTensor], data: st.DataObject) -> None:
    tensor, stored = laid
    stored.check()
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    out = torch.full((stop - start,), -1, dtype=tensor.dtype)
    stored.read(start, out)
    assert out.tolist() == tensor.flatten()[start:stop].tolist()


@given(laid_out(), st.data())
@settings(deadline=None)
def test_any_box_is_read_from_any_boxes(laid: tuple[Tensor, StoredTensor], data: st.DataObject) -> None:
    tensor, stored = laid
    box, begin = tensor, []
    for dim, length in enumerate(tensor.shape):
        begin.append(data.draw(st.integers(0, length)))
        box = box.narrow(dim, begin[-1], data.draw(st.integers(0, length - begin[-1])))
    # Of any strides: transposed, and with room between.
    room = torch.full([2 * length for length in reversed(box.shape)], -1, dtype=tensor.dtype)
    out = room[tuple(slice(None, None, 2) for _ in box.shape)].permute(tuple(reversed(range(box.dim()))))
    stored.read_box(begin, out)
    assert out.tolist() == box.tolist()


class Counted(HeldBytes):
    largest = 0

    def read_into(self, address: int, size_bytes: int, offset: int) -> None:
        self.largest = max(self.largest, size_bytes)
        super().read_into(address, size_bytes, offset)


@pytest.mark.parametrize(
    ("shape", "stride"), [((1024, 4096), (1, 1024)), ((4096, 1024), (1, 4096)), ((2, 1024, 2048), (2048, 4096, 1))]
)
def test_what_is_not_row_by_row_is_read_through_a_small_buffer(shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    numbers = torch.arange(1 << 22, dtype=torch.int32)
    file = Counted("it", numbers)
    stored = StoredTensor("it", torch.int32, shape, (Chunk(file, 0, (0,) * len(shape), shape, stride),))
    stored.check()
    out = torch.empty(stored.numel, dtype=torch.int32)
    for start in range(0, stored.numel, 1 << 20):
        stored.read(start, out[start : start + (1 << 20)])
    assert torch.equal(out.view(shape), numbers.as_strided(shape, stride))
    assert file.largest <= _BUFFER_BYTES


def test_a_tensor_in_columns_is_read_through_a_small_buffer() -> None:
    whole = torch.arange(1 << 22, dtype=torch.int32).view(1 << 10, 1 << 12)
    files = [Counted("it", part.contiguous()) for part in whole.chunk(2, 1)]
    chunks = [Chunk(file, 0, (0, place << 11), (1 << 10, 1 << 11)) for place, file in enumerate(files)]
    stored = StoredTensor("it", torch.int32, tuple(whole.shape), tuple(chunks))
    out = torch.empty(whole.numel(), dtype=torch.int32)
    stored.read(0, out)
    assert torch.equal(out.view(whole.shape), whole)
    assert max(file.largest for file in files) <= _BUFFER_BYTES


def test_a_tensor_in_one_piece_is_read_straight_into_place() -> None:
    file = Counted("it", torch.arange(1 << 22, dtype=torch.int32))
    stored = StoredTensor.whole("it", torch.int32, (1 << 11, 1 << 11), file, 0)
    assert stored.is_plain
    stored.read(5, torch.empty((1 << 22) - 5, dtype=torch.int32))
    assert file.largest == 4 * ((1 << 22) - 5)


def chunk(begin: Any, shape: Any, offset: int = 0) -> Chunk:
    return Chunk(HeldBytes("it", torch.zeros(100, dtype=torch.uint8)), offset, begin, shape)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([chunk((0, 0), (4, 4)), chunk((3, 0), (1, 4))], r"it and it both hold its part that begins at \(3, 0\)"),
        ([chunk((0, 0), (2, 4))], "16 elements, but the parts that exist hold 8"),
        ([], "16 elements, but the parts that exist hold 0"),
        ([chunk((0, 0), (4, 5))], r"said to begin at \(0, 0\) and to have the shape \(4, 5\)"),
        ([chunk((-1, 0), (4, 4))], r"said to begin at \(-1, 0\)"),
        ([chunk((0,), (4, 4))], r"said to begin at \(0,\)"),
        ([chunk((0, 0), (4,))], r"to have the shape \(4,\)"),
        ([chunk((0, 0), (4, 4), 85)], r"lies at bytes 85 to 101 of it, which has 100 bytes"),
        ([chunk((0, 0), (4, 4), -1)], r"lies at bytes -1 to 15"),
    ],
)
def test_boxes_that_do_not_make_up_the_tensor_are_refused(chunks: list[Chunk], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        StoredTensor("weight", torch.uint8, (4, 4), tuple(chunks)).check()


def test_two_scalars_for_one_are_refused() -> None:
    with pytest.raises(CheckpointError, match="both hold"):
        StoredTensor("weight", torch.uint8, (), (chunk((), ()), chunk((), ()))).check()


@pytest.mark.timeout(10)
def test_the_parts_of_thousands_of_ranks_are_checked_in_no_time() -> None:
    for shape in [(1, 4096), (4096, 1), (64, 64)]:
        rows, columns = shape
        file = HeldBytes("it", torch.zeros(1, dtype=torch.uint8))
        chunks = tuple(Chunk(file, 0, (row, column), (1, 1)) for row in range(rows) for column in range(columns))
        StoredTensor("weight", torch.uint8, shape, chunks).check()


def test_a_file_that_was_cut_short_since_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(64))
    stored = StoredTensor.whole("weight", torch.uint8, (8, 8), DataFile(tmp_path / "data"), 0)
    (tmp_path / "data").write_bytes(bytes(10))
    with pytest.raises(CheckpointError, match="data ends at byte 10"):
        stored.read(0, torch.empty(64, dtype=torch.uint8))


def test_names_for_the_same_bytes_are_told_from_equal_tensors() -> None:
    file = HeldBytes("it", torch.zeros(8, dtype=torch.uint8))
    one, tied, other = (
        StoredTensor.whole(str(n), torch.uint8, (4,), file, offset) for n, offset in enumerate([0, 0, 4])
    )
    assert one.is_same(tied)
    assert not one.is_same(other)
    assert one.order(1) < one.order(2) < other.order(0)
