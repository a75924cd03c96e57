"""Recordings that begin with the first large tensor: what precedes is real, and left alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nucleate.deferred import deferred, eager, handle_of, is_recording, record_of
from nucleate.deferred.context import deferred_from
from nucleate.materialize import materialize

CPU = torch.device("cpu")
NUMEL = 100


def is_deferred(tensor: Tensor) -> bool:
    return record_of(tensor) is not None


def test_small_tensors_are_real_and_nothing_is_recorded() -> None:
    with deferred_from(NUMEL, CPU) as record:
        layer = nn.Linear(9, 11)
        assert not is_recording()
    assert not is_deferred(layer.weight)
    assert record.tape.steps == []


def test_the_first_large_tensor_and_all_that_follow_are_deferred() -> None:
    with deferred_from(NUMEL, CPU):
        small = nn.Linear(3, 3)
        large = nn.Linear(10, 10)
        assert is_recording()
        later = nn.Linear(3, 3)
    assert not is_deferred(small.weight)
    assert all(map(is_deferred, (large.weight, large.bias, later.weight)))
    assert handle_of(large.weight) is not None


@pytest.mark.parametrize("num_small", [0, 1, 3])
def test_values_and_stream_are_eagers(num_small: int) -> None:
    def make() -> nn.Module:
        layers = [*(nn.Linear(3, 5) for _ in range(num_small)), nn.Linear(12, 12), nn.Linear(3, 3)]
        model = nn.Sequential(*layers)
        for layer in layers:
            nn.init.normal_(layer.weight)
        return model

    torch.manual_seed(1)
    expected = make()
    stream = torch.rand(4)
    torch.manual_seed(1)
    with deferred_from(NUMEL, CPU):
        model = make()
    assert torch.equal(torch.rand(4), stream)
    materialize(model)
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), model.parameters(), strict=True))


def test_data_does_not_begin_it() -> None:
    with deferred_from(NUMEL, CPU):
        layer = nn.Linear(20, 2)
        layer(torch.ones(NUMEL, 20)).sum().backward()
        assert not is_recording()
    assert layer.weight.grad is not None


class Passes(TorchDispatchMode):
    """A mode of the constructor's own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [nullcontext, Passes])
def test_a_function_that_is_recorded_whole_does_not_begin_it_inside(
    mode: Callable[[], AbstractContextManager[object]],
) -> None:
    def inside(query: Tensor) -> Tensor:
        # As the Python functions of torch do that a mode is told of.
        if torch.overrides.has_torch_function_unary(query):
            result: Tensor = torch.overrides.handle_torch_function(inside, (query,), query)
            return result
        return query + torch.empty(NUMEL, 1).fill_(1.0)

    with deferred_from(NUMEL, CPU), mode():
        assert not is_deferred(inside(torch.ones(1)))
        assert not is_recording()
        assert is_deferred(torch.empty(NUMEL))


def test_a_tensor_of_another_device_does_not_begin_it() -> None:
    with deferred_from(NUMEL, CPU):
        assert torch.empty(NUMEL, device="meta").is_meta
        with torch.device("meta"):
            nn.Linear(20, 20)
        assert not is_recording()


def test_a_thread_of_the_constructor_does_not_begin_it() -> None:
    made: list[nn.Module] = []
    with deferred_from(NUMEL, CPU):
        thread = threading.Thread(target=lambda: made.append(nn.Linear(20, 20)))
        thread.start()
        thread.join()
        assert not is_recording()
    assert not is_deferred(made[0].weight)


def test_it_does_not_begin_where_somebody_wants_real_tensors() -> None:
    with deferred_from(NUMEL, CPU):
        with eager():
            real = nn.Linear(20, 20)
        later = nn.Linear(20, 20)
    assert not is_deferred(real.weight)
    assert is_deferred(later.weight)


def test_a_context_inside_defers_at_once_and_its_tensors_do_not_count_as_survivors() -> None:
    with deferred_from(NUMEL, CPU) as record:
        with deferred():
            early = nn.Linear(3, 3)
        large = nn.Linear(20, 20)
        with deferred():
            late = nn.Linear(3, 3)
        _, tensors = record.survivors()
    survivors = set(map(id, tensors))
    assert {id(large.weight), id(large.bias)} == survivors
    assert is_deferred(early.weight)
    assert is_deferred(late.weight)


def test_tensors_of_another_model_that_are_edited_do_not_count_as_survivors() -> None:
    with deferred():
        other = nn.Linear(3, 3)
    with deferred_from(NUMEL, CPU) as record:
        large = nn.Linear(20, 20)
        nn.init.ones_(other.weight)
        model = nn.Sequential(other, large)
        _, tensors = record.survivors()
    assert {id(large.weight), id(large.bias)} == set(map(id, tensors))
    assert materialize(model)[0].weight.sum() == 9


def test_what_nobody_holds_any_more_does_not_count_as_a_survivor() -> None:
    with deferred_from(NUMEL, CPU) as record:
        model = nn.Sequential(nn.Linear(20, 20))
        model[0] = nn.Linear(30, 30)
        kept = torch.empty(2)
        _, tensors = record.survivors()
    assert {id(model[0].weight), id(model[0].bias), id(kept)} == set(map(id, tensors))


def test_before_it_begins_torch_computes_as_if_there_were_no_mode() -> None:
    # torch computes this in another way where a dispatch mode is active (`BatchLinearAlgebra.cpp`, 2.13).
    torch.manual_seed(0)
    matrices = [torch.rand(4, 4) for _ in range(20)]
    expected = [torch.linalg.cond(matrix) for matrix in matrices]
    half = torch.ones(3).half()
    with deferred_from(NUMEL, CPU):
        assert all(map(torch.equal, map(torch.linalg.cond, matrices), expected))
        assert torch.equal(torch.ones(3).type(torch.HalfTensor), half)


def test_it_begins_below_a_mode_of_the_constructor() -> None:
    class Counts(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    with deferred_from(NUMEL, CPU):
        with Counts() as counts:
            layer = nn.Linear(20, 20)
        again = F.linear(torch.ones(1, 20), layer.weight)
    assert counts.calls
    assert is_deferred(layer.weight)
    assert is_deferred(again)


def test_after_an_error_the_stream_is_eagers() -> None:
    torch.manual_seed(1)
    nn.Linear(20, 20)
    expected = torch.rand(4)
    torch.manual_seed(1)

    def fail() -> None:
        with deferred_from(NUMEL, CPU):
            nn.Linear(20, 20)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(torch.rand(4), expected)
    assert not is_recording()
