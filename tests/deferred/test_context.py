"""What surrounds a recording: patches, errors, several models, and what stays in memory."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn

from nucleate.deferred import deferred, eager, is_recording
from nucleate.deferred.randomness.program import RandomProgram
from nucleate.errors import UninitializedError
from nucleate.materialize import Plan, materialize
from tests.deferred.equality import assert_same_model


def torch_state() -> tuple[object, ...]:
    return (
        nn.init._no_grad_trunc_normal_,
        nn.Module.__setstate__,
        nn.Module.register_parameter,
        nn.Module.to,
        threading.Thread.start,
        torch.Tensor._make_subclass,
        "_make_subclass" in vars(torch.Tensor),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.get_default_dtype(),
        len(nn.modules.module._global_parameter_registration_hooks),
        len(nn.modules.module._global_buffer_registration_hooks),
        len(nn.modules.module._global_module_registration_hooks),
        is_recording(),
    )


class Failing(nn.Module):
    """Fails in the middle; what it made until then survives in `made`."""

    def __init__(self, error: BaseException, made: list[nn.Module]) -> None:
        super().__init__()
        made.append(self)
        self.layer = nn.Linear(40, 40)
        nn.init.trunc_normal_(self.layer.weight)
        self.own = nn.Parameter(self.layer.weight.data[:3] * 2)
        raise error


@contextmanager
def contexts(depth: int) -> Iterator[None]:
    with ExitStack() as stack:
        for context in (deferred, eager, deferred)[:depth]:
            stack.enter_context(context())
        yield


ERRORS = [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_constructor_that_raises_leaves_torch_and_the_stream_as_eager_would(
    error: type[BaseException], depth: int
) -> None:
    before, survivors = torch_state(), []
    torch.manual_seed(3)
    with pytest.raises(error):
        Failing(error(), survivors)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with pytest.raises(error), contexts(depth):
        Failing(error(), survivors)
    assert torch_state() == before
    assert torch.equal(torch.rand(3), expected)
    assert torch.initial_seed() == 3
    # What survives is as good as any deferred model.
    copy.deepcopy(survivors[1]).half()
    materialize(survivors[1])
    assert_same_model(*survivors)


def test_a_generator_function_that_is_closed_inside_leaves_torch_as_it_was() -> None:
    def construct() -> Iterator[nn.Module]:
        with deferred():
            yield nn.Linear(3, 3)

    before = torch_state()
    torch.manual_seed(0)
    suspended = construct()
    model = next(suspended)
    assert is_recording()
    suspended.close()
    assert torch_state() == before
    stream = torch.rand(3)
    torch.manual_seed(0)
    assert_same_model(nn.Linear(3, 3), materialize(model))
    assert torch.equal(torch.rand(3), stream)


def test_an_interrupt_while_the_context_ends_leaves_no_foreign_generator_state(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    nn.Linear(300, 300)
    expected = torch.rand(3)
    true_states, interrupts = RandomProgram.true_states, [KeyboardInterrupt()]

    def interrupted(program: RandomProgram) -> object:
        if interrupts:
            raise interrupts.pop()
        return true_states(program)

    monkeypatch.setattr(RandomProgram, "true_states", interrupted)
    before = torch_state()
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt), deferred():
        model = nn.Linear(300, 300)
    assert torch_state() == before
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(0)
    assert_same_model(nn.Linear(300, 300), materialize(model))


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
    for eager_model, model in zip(expected, (first, second, third), strict=True):
        assert_same_model(eager_model, model)


def test_a_parameter_that_no_module_holds_may_be_given_to_one_later() -> None:
    torch.manual_seed(0)
    expected = nn.Parameter(torch.randn(3))
    torch.manual_seed(0)
    with deferred():
        parameter = nn.Parameter(torch.randn(3))
    model = nn.Module()
    model.weight = parameter
    assert materialize(model).weight is parameter
    assert torch.equal(parameter, expected)


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


def test_a_plan_of_meta_parameters_without_a_recipe_is_an_error_by_name() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UninitializedError, match=r"no recipe: 0\.weight, 0\.bias"):
        Plan.of(model)


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
