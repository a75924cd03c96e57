"""Boxes of a tensor are cut out of its storage, by one thread or several."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nucleate.deferred import ComputedSource, bind, deferred, handle_of
from nucleate.deferred.replay.ranges import RangeMaker
from nucleate.materialize import making, materialize, parts
from nucleate.materialize.making import make_parts
from nucleate.materialize.parts import Columns, Range, parts_of
from tests.deferred.test_computed_given import held
from tests.device import cpu_only, device

pytestmark = pytest.mark.usefixtures("factories_on_device")


def pieces_of_shape(*shape: int) -> tuple[torch.Tensor, RangeMaker]:
    """Return a tensor of a shape, and how the storage is made in which it lies behind 16 other elements."""
    numel = 16 + math.prod(shape)
    torch.manual_seed(2)
    expected = torch.randn(numel, device="cpu")[16:].view(shape)
    torch.manual_seed(2)
    # In pieces is made what is recorded for the CPU, wherever it goes to.
    with torch.device("cpu"), deferred():
        model = nn.Module()
        model.weight = nn.Parameter(torch.randn(numel))
    handle = handle_of(model.weight)
    assert handle is not None
    found = handle.record.maker(handle.record.tape.ref(model.weight).storage)
    assert found is not None
    return expected, found


@st.composite
def boxes(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    offsets = [draw(st.integers(0, length - 1)) for length in shape]
    sizes = [draw(st.integers(0, length - offset)) for length, offset in zip(shape, offsets, strict=True)]
    return shape, offsets, sizes


@given(box=boxes(), narrow=st.booleans())
@settings(max_examples=120, deadline=None)
def test_any_box_is_cut_exactly(box: tuple[list[int], list[int], list[int]], narrow: bool) -> None:
    shape, offsets, sizes = box
    expected, maker = pieces_of_shape(*shape)
    out = torch.full(sizes, float("nan"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "MIN_RANGE_NUMEL", 1000 if narrow else 1)
        patch.setattr(parts, "BUFFER_NUMEL", 20)
        # As `execute` does, without a default device.
        with torch.device("cpu"):
            make_parts(list(parts_of(maker, 16, shape, offsets, out)), 1)
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        expected = expected.narrow(dim, offset, size)
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize(("offsets", "size"), [((0, 100), (300, 100)), ((7, 0), (50, 512)), ((3, 5), (200, 400))])
def test_a_box_of_a_transposed_tensor_reads_only_what_is_in_it(offsets: tuple[int, int], size: tuple[int, int]) -> None:
    file = held(512, 300)
    with deferred(device()):
        tensor = torch.empty(file.shape)
        bind(tensor, file)
        given = ComputedSource(tensor.t())
    out = torch.full(size, float("nan"))
    make_parts(list(parts_of(RangeMaker.of(given, torch.float32), 0, given.shape, offsets, out)), 2)
    assert torch.equal(out, file.tensor.t()[offsets[0] : offsets[0] + size[0], offsets[1] : offsets[1] + size[1]])
    assert file.num_read == out.numel()


def test_a_shard_of_rows_is_one_range_and_one_of_short_columns_is_cut_from_rows() -> None:
    _, maker = pieces_of_shape(8, 6)
    (rows,) = parts_of(maker, 0, (8, 6), (2, 0), torch.empty(3, 6))
    assert isinstance(rows, Range)
    assert (rows.start, rows.out.numel()) == (12, 18)
    (columns,) = parts_of(maker, 0, (8, 6), (0, 3), torch.empty(8, 3))
    assert isinstance(columns, Columns)


def test_few_columns_of_very_wide_rows_are_made_alone() -> None:
    width = parts.BUFFER_NUMEL + 1
    _, maker = pieces_of_shape(3, 5)
    found = list(parts_of(maker, 0, (3, width), (0, 7), torch.empty(3, 2)))
    assert [(type(part), part.start) for part in found] == [(Range, 7 + row * width) for row in range(3)]


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_the_number_of_threads_does_not_change_a_bit(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Embedding(1003, 33), nn.Linear(333, 77), nn.Linear(5, 3), nn.Linear(64, 999))

    monkeypatch.setattr(making, "MIN_NUMEL_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    torch.manual_seed(0)
    eager = make()
    torch.manual_seed(0)
    with deferred(device()):
        model = make()
    materialize(model, device())
    for expected, actual in zip(eager.parameters(), model.parameters(), strict=True):
        assert torch.equal(expected, actual)


@cpu_only("only what is made on the CPU is made by several threads of ours")
def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: RangeMaker, start: int, out: torch.Tensor, cursors: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(making, "MIN_NUMEL_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(RangeMaker, "make", fail)
    with deferred(device()):
        model = nn.Linear(100, 100)
    with pytest.raises(MemoryError, match="no more"):
        materialize(model, device())


def test_threads_write_what_was_allocated_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "MIN_NUMEL_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with deferred(device()):
        model = nn.Linear(300, 300)
    with torch.inference_mode():
        materialize(model, device())
    assert float(model.weight.detach().std()) > 0
