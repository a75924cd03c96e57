"""Reading what is given into memory that is there already."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given as forall
from hypothesis import strategies as st
from torch import Tensor

from nucleate.deferred import ElementSource
from nucleate.deferred.elements.element_source import fill_from
from nucleate.materialize.reading import GivenBox, read_into

pytestmark = pytest.mark.usefixtures("factories_on_device")


class Held(ElementSource):
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.dtype = tensor.dtype
        self.shape = tuple(tensor.shape)
        self.num_read = 0

    def read(self, start: int, out: Tensor) -> None:
        self.num_read += out.numel()
        out.copy_(self.tensor.reshape(-1)[start : start + out.numel()])

    def order(self, start: int) -> tuple[int, int]:
        return (0, start)

    def describe(self) -> str:
        return "held"


def numbers(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    offsets = [draw(st.integers(0, length - 1)) for length in shape]
    sizes = [draw(st.integers(1, length - offset)) for length, offset in zip(shape, offsets, strict=True)]
    return tuple(shape), tuple(offsets), tuple(sizes)


@forall(boxes(), st.sampled_from([torch.float32, torch.float64]))
def test_any_box_is_read(box: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], dtype: torch.dtype) -> None:
    shape, offsets, sizes = box
    whole = numbers(*shape)
    out = torch.empty(sizes, dtype=dtype)
    fill_from(out, GivenBox(Held(whole), offsets, sizes))
    expected = whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
    assert torch.equal(out, expected.to(dtype))


def test_rows_of_a_box_cost_their_own_bytes() -> None:
    held = Held(numbers(100, 50))
    out = torch.empty(10, 50)
    fill_from(out, GivenBox(held, (40, 0), (10, 50)))
    assert held.num_read == 500
    assert torch.equal(out, held.tensor[40:50])


def test_tensors_of_every_layout_are_filled_together() -> None:
    plain, transposed, scalar, empty = numbers(30, 20), numbers(20, 30), torch.zeros(()), torch.zeros(0, 3)
    pairs: list[tuple[Tensor, ElementSource]] = [
        (torch.zeros(30, 20), Held(plain)),
        (torch.zeros(30, 20).t(), Held(transposed)),
        (scalar, Held(torch.tensor(3.0))),
        (empty, Held(torch.zeros(0, 3))),
        (torch.zeros(30, 20, dtype=torch.bfloat16), Held(plain)),
    ]
    read_into(pairs)
    assert torch.equal(pairs[0][0], plain)
    assert torch.equal(pairs[1][0], transposed)
    assert scalar.item() == 3.0
    assert torch.equal(pairs[4][0], plain.bfloat16())


def test_parameters_are_filled_without_a_graph() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 5))
    read_into([(weight, Held(numbers(4, 5)))])
    assert weight.is_leaf
    assert torch.equal(weight, numbers(4, 5))


@forall(boxes(), st.data())
def test_any_range_of_a_box_is_read(
    box: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], data: st.DataObject
) -> None:
    shape, offsets, sizes = box
    expected = numbers(*shape)[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].reshape(-1)
    start = data.draw(st.integers(0, expected.numel() - 1))
    stop = data.draw(st.integers(start + 1, expected.numel()))
    out = torch.empty(stop - start)
    GivenBox(Held(numbers(*shape)), offsets, sizes).read(start, out)
    assert torch.equal(out, expected[start:stop])
