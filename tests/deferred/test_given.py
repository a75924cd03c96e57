"""Deferred tensors whose content comes from elsewhere: what is read, when, and what is done to it afterwards."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given as forall
from hypothesis import strategies as st
from torch import Tensor, nn

from nucleate.deferred import ComputedSource, ElementSource, bind, deferred, resumed
from nucleate.deferred.elements.element_source import fill_from, fill_range_from
from nucleate.errors import DeferredEditError
from nucleate.materialize import materialize


class Held(ElementSource):
    """A tensor in memory that counts what is read of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.contiguous()
        self.dtype = tensor.dtype
        self.shape = tuple(tensor.shape)
        self.ranges: list[tuple[int, int]] = []

    def read(self, start: int, out: Tensor) -> None:
        self.ranges.append((start, start + out.numel()))
        out.copy_(self.tensor.view(-1)[start : start + out.numel()])

    def order(self, start: int) -> tuple[int, int]:
        return (id(self) % 97, start)

    def describe(self) -> str:
        return f"held {self.shape} {self.dtype} {self.tensor.double().sum().item()}"

    @property
    def num_read(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


def held(*shape: int, dtype: torch.dtype = torch.float32) -> Held:
    numel = int(torch.Size(shape).numel())
    return Held(torch.arange(1, numel + 1, dtype=torch.float64).div(7).view(shape).to(dtype))


def test_nothing_is_read_before_the_tensor_is_made_and_then_everything_once() -> None:
    with deferred():
        model = nn.Linear(300, 200)
    weight = held(200, 300)
    bind(model.weight, weight)
    assert weight.ranges == []
    materialize(model)
    assert torch.equal(model.weight, weight.tensor)
    assert weight.num_read == 200 * 300


def test_what_is_not_given_is_made_by_its_recipe_and_the_stream_is_eagers() -> None:
    torch.manual_seed(3)
    eager = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    after = torch.rand(4)
    torch.manual_seed(3)
    with deferred():
        model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    assert torch.equal(torch.rand(4), after)
    bind(model[0].weight, held(32, 64))
    materialize(model)
    assert torch.equal(model[1].weight, eager[1].weight)
    assert torch.equal(model[0].bias, eager[0].bias)
    assert torch.equal(model[0].weight, held(32, 64).tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
def test_it_is_cast_to_the_dtype_of_the_tensor(dtype: torch.dtype) -> None:
    with deferred():
        model = nn.Linear(111, 77, dtype=torch.bfloat16)
    source = held(77, 111, dtype=dtype)
    bind(model.weight, source)
    materialize(model)
    assert torch.equal(model.weight, source.tensor.to(torch.bfloat16))


def cast(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def scale(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.mul_(2)


def overwrite(model: nn.Module) -> None:
    nn.init.ones_(model[0].weight)


def write_rows(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight[3:5].zero_()


def transpose(model: nn.Module) -> None:
    model[1].weight = nn.Parameter(model[0].weight.data.t().contiguous())


@pytest.mark.parametrize("edit", [cast, scale, overwrite, write_rows, transpose])
def test_what_is_done_afterwards_is_done_to_what_was_given(edit: Callable[[Any], None]) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 24))

    expected = make()
    with torch.no_grad():
        expected[0].weight.copy_(held(16, 24).tensor)
    edit(expected)
    with deferred():
        model = make()
    bind(model[0].weight, held(16, 24))
    with resumed(model):
        edit(model)
    materialize(model)
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_ties_and_copies_see_it_and_a_copy_taken_before_does_not() -> None:
    with deferred():
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
        model["b"].weight = model["a"].weight
        before = copy.deepcopy(model["a"])
    bind(model["b"].weight, held(8, 8))
    after = copy.deepcopy(model["a"])
    for each in (model, before, after):
        materialize(each)
    torch.manual_seed(0)
    assert torch.equal(before.weight, nn.Linear(8, 8, bias=False).weight)
    assert model["a"].weight is model["b"].weight
    assert torch.equal(model["a"].weight, held(8, 8).tensor)
    assert torch.equal(after.weight, held(8, 8).tensor)


def test_a_part_of_a_storage_is_replaced_and_the_rest_stays() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Module()
        whole = torch.randn(6, 5)
        model.register_buffer("upper", whole[:2])
        model.register_buffer("lower", whole[2:])
        return model

    expected = make()
    expected.upper.copy_(held(2, 5).tensor)
    with deferred():
        model = make()
    bind(model.upper, held(2, 5))
    materialize(model)
    assert torch.equal(model.upper, expected.upper)
    assert torch.equal(model.lower, expected.lower)
    assert model.upper.untyped_storage().data_ptr() == model.lower.untyped_storage().data_ptr()


def test_inside_the_context_it_is_read_where_a_value_is_asked_for() -> None:
    elements = held(4, 4)
    last = elements.tensor[3, 3].item()
    with deferred():
        model = nn.Linear(4, 4)
        bind(model.weight, elements)
        assert elements.ranges == []
        assert model.weight[3, 3].item() == last
        with torch.no_grad():
            model.bias.copy_(model.weight.sum(1))
    materialize(model)
    assert torch.equal(model.bias, held(4, 4).tensor.sum(1))


def test_a_tensor_that_was_edited_unseen_is_refused() -> None:
    with deferred():
        model = nn.Linear(4, 4)
    with torch._C.DisableTorchFunction():
        model.weight.detach().zero_()
    with pytest.raises(DeferredEditError, match="weight was edited outside"):
        bind(model.weight, held(4, 4))


def test_a_later_unseen_edit_is_still_seen() -> None:
    with deferred():
        model = nn.Linear(4, 4)
    bind(model.weight, held(4, 4))
    with torch._C.DisableTorchFunction():
        model.weight.detach().zero_()
    with pytest.raises(DeferredEditError, match="weight"):
        materialize(model)


def test_ranks_that_are_given_other_elements_have_other_fingerprints() -> None:
    from nucleate.materialize import Plan

    def digest(source: Held | None) -> str:
        torch.manual_seed(0)
        with deferred():
            model = nn.Linear(4, 4)
        if source is not None:
            bind(model.weight, source)
        return Plan.of(model).digest()

    assert digest(held(4, 4)) == digest(held(4, 4))
    assert len({digest(None), digest(held(4, 4)), digest(Held(torch.zeros(4, 4)))}) == 3


@forall(
    shape=st.lists(st.integers(0, 5), max_size=3),
    source=st.sampled_from([torch.float32, torch.float16, torch.int64]),
    target=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    transposed=st.booleans(),
)
def test_any_real_tensor_is_filled(
    shape: list[int], source: torch.dtype, target: torch.dtype, transposed: bool
) -> None:
    elements = held(*shape, dtype=source)
    out = torch.full(tuple(reversed(shape)) if transposed else tuple(shape), -1, dtype=target)
    if transposed:
        out = out.permute(list(reversed(range(out.dim()))))
    fill_from(out, elements)
    assert torch.equal(out, elements.tensor.to(target))


@forall(start=st.integers(0, 40), count=st.integers(0, 40))
def test_ranges_are_filled(start: int, count: int) -> None:
    elements = held(80)
    out = torch.empty(count, dtype=torch.float16)
    fill_range_from(out, elements, start)
    assert torch.equal(out, elements.tensor[start : start + count].half())


def test_memory_that_is_there_already_becomes_the_tensors_own() -> None:
    class Lying(Held):
        def memory(self) -> torch.UntypedStorage:
            return self.tensor.untyped_storage()

    with deferred():
        model = nn.Linear(16, 16, bias=False)
    source = Lying(torch.randn(16, 16))
    bind(model.weight, source)
    materialize(model)
    assert model.weight.data_ptr() == source.tensor.data_ptr()
    assert source.ranges == []


def test_memory_of_another_dtype_is_read() -> None:
    class Lying(Held):
        def memory(self) -> torch.UntypedStorage:
            raise AssertionError("not to be asked")

    with deferred():
        model = nn.Linear(16, 16, bias=False, dtype=torch.float64)
    bind(model.weight, Lying(torch.randn(16, 16)))
    materialize(model)
    assert model.weight.dtype == torch.float64


def test_a_buffer_that_was_first_used_in_inference_mode_serves_everywhere() -> None:
    def load() -> Tensor:
        out = torch.empty(700, dtype=torch.bfloat16)
        fill_range_from(out, held(700, dtype=torch.float64), 0)
        return out

    def first() -> None:
        with torch.inference_mode():
            found.append(load().clone())
        found.append(load())

    found: list[Tensor] = []
    thread = threading.Thread(target=first)
    thread.start()
    thread.join()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], held(700, dtype=torch.float64).tensor.bfloat16())


class Doubled(ElementSource):
    """Twice the elements of another one, which are cast on the way."""

    dtype = torch.float32

    def __init__(self, inner: ElementSource) -> None:
        self.inner = inner
        self.shape = inner.shape

    def read(self, start: int, out: Tensor) -> None:
        half = out.numel() // 2
        for first, last in ((0, half), (half, out.numel())):
            fill_range_from(out[first:last], self.inner, start + first)
        out.mul_(2)

    def order(self, start: int) -> tuple[int, int]:
        return self.inner.order(start)

    def describe(self) -> str:
        return f"twice {self.inner.describe()}"


def test_what_is_cast_may_itself_be_made_of_what_is_cast() -> None:
    values = torch.randn(300_000).to(torch.bfloat16)
    source = Doubled(Doubled(Held(values)))
    wanted = (values.float() * 4).half()
    for _ in range(2):
        out = torch.empty(len(values), dtype=torch.float16)
        fill_range_from(out, source, 0)
        assert torch.equal(out, wanted)


def test_a_tensor_computed_of_a_cast_one_is_cast_in_ranges() -> None:
    values = torch.randn(100_000).to(torch.bfloat16)
    with deferred():
        weight = nn.Parameter(torch.empty(len(values)))
        bind(weight, Held(values))
        with torch.no_grad():
            weight.mul_(2)
        model = nn.Module()
        model.cast = nn.Parameter(torch.empty(len(values), dtype=torch.float16))
        bind(model.cast, ComputedSource(weight))
    materialize(model)
    assert torch.equal(model.cast.detach(), (values.float() * 2).half())
