"""Conversions: what is recorded, and that any cut of a tensor gives the same outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nucleate.deferred import ConvertedSource, ElementSource, convert, deferred, record_of, resumed
from nucleate.errors import ConversionError, DeferredUseError
from tests.deferred.rows import Blocks, Rows


class Held(ElementSource):
    """Elements in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.shape, self._flat = tensor.dtype, tuple(tensor.shape), tensor.reshape(-1)

    def read(self, start: int, out: Tensor) -> None:
        out.copy_(self._flat[start : start + out.numel()])

    def order(self, start: int) -> tuple[int, int]:
        return (0, start)

    def describe(self) -> str:
        return "held"


def reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.float().abs().amax(1)
    return torch.round(weight.float() * (127.0 / scales)[:, None]).to(torch.int8), scales


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (700, 1000), (2, 70_000)])
def test_a_real_tensor_is_converted_at_once_by_any_number_of_threads(shape: tuple[int, int], num_threads: int) -> None:
    weight = torch.randn(shape)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        made = convert(weight, Rows())
    finally:
        torch.set_num_threads(before)
    for out, expected in zip(made, reference(weight), strict=True):
        assert torch.equal(out, expected)


def test_a_view_that_is_not_contiguous_is_converted_in_the_order_of_its_indices() -> None:
    weight = torch.randn(40, 30).t()
    assert torch.equal(convert(weight, Rows())[0], reference(weight)[0])


def test_the_outputs_of_a_deferred_tensor_are_deferred() -> None:
    with deferred():
        model = nn.Linear(4, 3)
        codes, scales = convert(model.weight, Rows())
        model.codes, model.scales = nn.Parameter(codes, requires_grad=False), nn.Parameter(scales)
    assert (codes.shape, codes.dtype, scales.shape) == ((3, 4), torch.int8, (3,))
    assert record_of(model.codes) is record_of(model.weight) is not None
    with pytest.raises(DeferredUseError):
        codes.tolist()


def test_what_cannot_be_converted_is_refused_when_it_is_recorded() -> None:
    with deferred():
        model = nn.Linear(4, 3)
    with resumed(model), pytest.raises(ConversionError, match=r"\(3,\)"):
        convert(model.bias, Rows())


@given(st.integers(1, 400), st.data())
def test_any_range_of_an_output_is_read_as_it_would_be_whole(numel: int, data: st.DataObject) -> None:
    values = torch.randn(numel)
    whole = convert(values, Blocks())
    for number, out in enumerate(whole):
        lazily = ConvertedSource(Held(values), Blocks(), number)
        assert (lazily.shape, lazily.dtype) == (tuple(out.shape), out.dtype)
        start = data.draw(st.integers(0, out.numel()))
        stop = data.draw(st.integers(start, out.numel()))
        part = torch.full((stop - start,), torch.nan, dtype=out.dtype)
        lazily.read(start, part)
        assert torch.equal(part, out.view(-1)[start:stop])


def test_elements_are_cast_before_they_are_converted() -> None:
    weight = torch.randn(5, 40)
    lazily = ConvertedSource(Held(weight), Rows(), 1, torch.bfloat16)
    scales = torch.empty(5)
    lazily.read(0, scales)
    assert torch.equal(scales, reference(weight.bfloat16())[1])


def test_conversions_of_conversions_are_read_in_ranges_too() -> None:
    weight = torch.randn(64, 100)
    scales = reference(weight)[1]
    lazily = ConvertedSource(ConvertedSource(Held(weight), Rows(), 1), Blocks(), 1)
    sums = torch.empty(7, dtype=torch.float64)
    lazily.read(0, sums)
    assert torch.equal(sums, convert(scales, Blocks())[1])
