"""What surrounds a recording: patches, errors, several models, and what stays in memory."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from nucleate.deferred import deferred
from nucleate.errors import UninitializedError
from nucleate.materialize import materialize
from tests.deferred.equality import assert_same_model


def _torch_state() -> tuple[object, ...]:
    return (
        torch.nn.init._no_grad_trunc_normal_,
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.get_default_dtype(),
        len(nn.modules.module._global_parameter_registration_hooks),
        len(nn.modules.module._global_buffer_registration_hooks),
        len(nn.modules.module._global_module_registration_hooks),
    )


def test_a_constructor_that_raises_leaves_torch_and_the_stream_as_eager_would() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)
            raise ZeroDivisionError

    before = _torch_state()
    torch.manual_seed(3)
    with pytest.raises(ZeroDivisionError):
        Failing()
    expected = torch.rand(3)
    torch.manual_seed(3)
    with pytest.raises(ZeroDivisionError), deferred():
        Failing()
    assert _torch_state() == before
    assert torch.equal(torch.rand(3), expected)
    assert torch.initial_seed() == 3


def test_two_models_in_one_context_can_be_made_in_any_order() -> None:
    torch.manual_seed(0)
    expected = (nn.Linear(40, 30), nn.LSTM(3, 4))
    torch.manual_seed(0)
    with deferred():
        first, second = nn.Linear(40, 30), nn.LSTM(3, 4)
    materialize(second)
    torch.manual_seed(99)
    materialize(first)
    assert_same_model(expected[0], first)
    assert_same_model(expected[1], second)


def test_a_model_can_be_made_in_parts() -> None:
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    torch.manual_seed(0)
    with deferred():
        model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    materialize(model[1])
    model[1].bias.data.add_(1)
    materialize(model)
    expected[1].bias.data.add_(1)
    assert_same_model(expected, model)


def test_contexts_nest_and_follow_one_another() -> None:
    torch.manual_seed(0)
    expected = [nn.Linear(20, 20) for _ in range(3)]
    torch.manual_seed(0)
    with deferred():
        first = nn.Linear(20, 20)
        with deferred():
            second = nn.Linear(20, 20)
    with deferred():
        third = nn.Linear(20, 20)
    for model in (third, first, second):
        materialize(model)
    for eager, model in zip(expected, (first, second, third), strict=True):
        assert_same_model(eager, model)


def test_a_context_in_a_thread_leaves_other_threads_alone() -> None:
    made: list[nn.Module] = []

    def construct() -> None:
        with deferred():
            made.append(nn.Linear(3, 3))

    with deferred():
        thread = threading.Thread(target=construct)
        thread.start()
        thread.join()
        inside = nn.Linear(3, 3)
    assert not nn.Linear(2, 2).weight.is_meta
    materialize(made[0])
    materialize(inside)
    assert made[0](torch.ones(1, 3)).isfinite().all()


def test_real_tensors_are_left_alone() -> None:
    outside = nn.Linear(3, 3)
    weight = outside.weight.detach().clone()
    with deferred():
        model = nn.Sequential(outside, nn.Linear(3, 3))
    materialize(model)
    assert model[0].weight is outside.weight
    assert torch.equal(outside.weight, weight)


@pytest.mark.parametrize("part", ["nothing", "half", "a column"])
def test_what_nothing_ever_wrote_is_an_error_by_name(part: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ok = nn.Linear(2, 2)
            self.forgotten = nn.Parameter(torch.empty(4, 4))
            with torch.no_grad():
                if part == "half":
                    self.forgotten[:2].zero_()
                elif part == "a column":
                    self.forgotten[:, 1].zero_()

    with deferred():
        model = Model()
    with pytest.raises(UninitializedError, match="forgotten") as raised:
        materialize(model)
    assert "ok" not in str(raised.value).split()
    # Nothing was changed: the model can still be repaired.
    with deferred():
        model.forgotten = nn.Parameter(torch.zeros(4, 4))
    materialize(model)


def test_parts_that_together_write_everything_are_enough() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, 4))
            with torch.no_grad():
                self.weight[:, :2].normal_()
                self.weight[:, 2:].zero_()

    torch.manual_seed(0)
    eager = Model()
    torch.manual_seed(0)
    with deferred():
        model = Model()
    materialize(model)
    assert_same_model(eager, model)


def test_a_meta_parameter_without_a_recipe_is_an_error_by_name() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UninitializedError, match=r"no recipe: 0\.weight, 0\.bias"):
        materialize(model)


def test_the_record_goes_when_the_last_tensor_is_made() -> None:
    with deferred() as record:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    alive = weakref.ref(record)
    del record
    materialize(model[0])
    assert alive() is not None
    materialize(model[1])
    gc.collect()
    assert alive() is None


def test_memory_that_held_garbage_shows_nothing_unwritten() -> None:
    torch.manual_seed(0)
    eager = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
    torch.manual_seed(0)
    with deferred():
        model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
    # With this flag torch fills whatever `empty` returns with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        poison = [torch.full((1 << 14,), float("nan")) for _ in range(64)]
        del poison
        materialize(model)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_model(eager, model)
