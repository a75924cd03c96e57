"""A constructor in `torch.inference_mode()`, or with such a mode inside, makes the model that it makes without grad."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nucleate.deferred import deferred, handle_of, ordinary, outside_inference_mode
from nucleate.deferred.recording.op_schema import schema_of
from nucleate.materialize import materialize
from tests.deferred.equality import (
    assert_same_model,
    bits,
    named_attributes,
    named_tensors,
    seed_everything,
    streams,
)
from tests.deferred.idioms.idiom import Body, Constructed
from tests.device import cpu_only, device, on_device

FAMILIES = (
    "control_flow", "host_reads", "kinds_of_tensors", "modes", "modules", "numerics", "numpy", "randomness",
    "serialization", "storage",
)  # fmt: skip
# In eager torch it leaves an inference tensor behind, in a variable that outlives it.
SPOILING = {("a_global_tensor_is_read_and_written", "inside")}

Make = Callable[[], nn.Module]
Mode = Callable[[], AbstractContextManager[Any]]


def idioms() -> Iterator[Any]:
    for family in FAMILIES:
        for name, body in importlib.import_module(f"tests.deferred.idioms.test_{family}").idiom.items():
            for where in ("around", "inside"):
                if (name, where) not in SPOILING:
                    yield pytest.param(body, where, id=f"{family}-{name}-{where}")


def everything(model: nn.Module) -> list[Tensor]:
    return [*named_tensors(model).values(), *named_attributes(model).values()]


def is_inference(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.is_inference()


def eagerly(make: Make, mode: Mode) -> nn.Module:
    seed_everything(0)
    with mode(), on_device():
        return make()


def deferredly(make: Make, around: Mode, inside: Mode = nullcontext) -> nn.Module:
    seed_everything(0)
    with around(), on_device(), deferred(device()), inside():
        return make()


def assert_as_without_grad(make: Make, around: Mode, inside: Mode = nullcontext) -> nn.Module:
    expected = eagerly(make, torch.no_grad)
    after = streams()
    model = deferredly(make, around, inside)
    assert streams() == after
    assert not any(is_inference(t) for t in everything(model) if handle_of(t) is not None)
    materialize(model, device())
    assert_same_model(expected, model)
    assert not any(tensor.is_inference() for tensor in everything(model))
    return model


@cpu_only("idioms that other devices cannot run are marked elsewhere")
@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(("body", "where"), list(idioms()))
def test_idioms_are_exact(body: Body, where: str) -> None:
    def make() -> nn.Module:
        return Constructed(body)

    modes = (torch.inference_mode, nullcontext) if where == "around" else (nullcontext, torch.inference_mode)
    try:
        eagerly(make, torch.no_grad)
    except Exception as error:
        # Eager construction cannot do it without gradients, so deferred construction must not pretend that it can.
        with pytest.raises(type(error)):
            materialize(deferredly(make, *modes), device())
        return
    assert_as_without_grad(make, *modes)


# -- modes of every kind ----------------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """Computes by operations that copy only where they cannot view, or only if something changes."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 4)
        self.register_buffer("table", torch.arange(4).float() / 2)
        self.register_buffer("given", torch.tensor([1.0, 2.0]))
        self.register_buffer("turned", self.line.weight.detach().t().contiguous().reshape(2, 8).to(torch.bfloat16))
        self.register_buffer("flat", self.line.weight.detach().t().flatten())
        self.register_buffer("viewed", self.line.weight.detach().to(torch.float32).reshape(-1))
        self.register_buffer("drawn", torch.rand(3).double().narrow(0, 1, 2).chunk(2)[1].expand_as(self.given).clone())
        self.scale = nn.Parameter(self.table.new_ones(4).type_as(self.table))
        with torch.no_grad():
            self.line.bias[1:].view(3, 1)[0] = 2
            self.line.bias.square_().clip_(max=3)
        self.parts = list(torch.ones(2, 3).split(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.line(x) * self.table * self.scale)[0] + self.given.sum() + self.turned.float().sum()


class Decorated(Rotary):
    @torch.inference_mode()
    def __init__(self) -> None:
        super().__init__()


class Method(Rotary):
    def __init__(self) -> None:
        super().__init__()
        self.initialize()

    @torch.inference_mode()
    def initialize(self) -> None:
        nn.init.trunc_normal_(self.line.weight)
        self.lstm.weight_hh_l0.mul_(self.line.weight.std())
        self.register_buffer("late", self.line.weight.to(torch.float64))


def left_and_entered_again() -> nn.Module:
    with torch.inference_mode(False):
        assert torch.is_grad_enabled()
        first = nn.Linear(4, 4)
        first.weight.data = (first.weight * 2).detach()
        with torch.inference_mode():
            second = Rotary()
    return nn.ModuleList([first, second])


def by_its_guard() -> nn.Module:
    with torch._C._InferenceMode(True):
        return Rotary()


def in_a_thread() -> nn.Module:
    made: list[nn.Module] = []

    def run() -> None:
        # A thread has modes of its own.
        with torch.inference_mode(), on_device():
            made.append(Rotary())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return made[0]


MAKERS: dict[str, Make] = {
    "plainly": Rotary,
    "decorated constructor": Decorated,
    "decorated method": Method,
    "left and entered again": left_and_entered_again,
    "by its guard": by_its_guard,
    "in a thread": in_a_thread,
}


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_models_are_exact_and_can_be_trained(make: Make, around: Mode) -> None:
    model = assert_as_without_grad(make, around)
    rotary: Any = model[1] if isinstance(model, nn.ModuleList) else model
    optimizer = torch.optim.Adam(model.parameters())
    before = bits(rotary.line.weight)
    rotary(torch.ones(2, 1, 4, device=device())).sum().backward()
    optimizer.step()
    assert bits(rotary.line.weight) != before
    assert rotary.scale.grad is not None


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad])
def test_values_are_made_in_any_mode(around: Mode) -> None:
    expected = eagerly(Decorated, torch.no_grad)
    model = deferredly(Decorated, nullcontext)
    with around():
        materialize(model, device())
        assert torch.is_inference_mode_enabled() == (around is torch.inference_mode)
    assert_same_model(expected, model)
    assert not any(tensor.is_inference() for tensor in everything(model))


@pytest.mark.parametrize("make", [Rotary, Decorated])
def test_what_was_deferred_in_the_mode_is_edited_outside_of_it(make: Make) -> None:
    def edit(model: Any) -> nn.Module:
        with torch.no_grad():
            model.line.weight.mul_(2)
        nn.init.normal_(model.line.bias)
        return model  # type: ignore[no-any-return]

    expected = eagerly(lambda: edit(Rotary()), torch.no_grad)
    model = deferredly(make, torch.inference_mode)
    with on_device(), deferred(device()):
        edit(model)
    materialize(model, device())
    assert_same_model(expected, model)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_a_state_dict_is_loaded_outside_of_the_block(mode: Mode, assign: bool) -> None:
    with on_device():
        source = Rotary()
    model = deferredly(Decorated, torch.inference_mode)
    with mode():
        model.load_state_dict(source.state_dict(), assign=assign)
        model.half()
        model.line.reset_parameters()
    materialize(model, device())
    assert bits(model.scale) == bits(source.scale.half())
    assert bits(model.table) == bits(source.table.half())
    assert not any(tensor.is_inference() for tensor in everything(model))


def test_inference_tensors_from_outside_are_read_and_written() -> None:
    with torch.inference_mode(), on_device():
        given = torch.arange(6).float()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6) * given)
            with torch.inference_mode():
                given.add_(self.weight.sum())
                given.copy_(given * self.weight)
                self.register_buffer("seen", given.clone())

    expected = eagerly(Model, nullcontext)
    with torch.inference_mode():
        given.copy_(torch.arange(6))
    model = deferredly(Model, nullcontext)
    materialize(model, device())
    assert_same_model(expected, model)


def test_a_generators_state_of_the_mode_is_a_true_one_afterwards() -> None:
    torch.manual_seed(0)
    first = torch.rand(3)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    with deferred():
        with torch.inference_mode():
            values = torch.rand(3)
            state = torch.get_rng_state()
        holder = nn.Module()
        holder.values = values
    assert torch.equal(state, expected)
    materialize(holder)
    assert torch.equal(holder.values, first)


def test_the_mode_is_on_again_after_the_block() -> None:
    with torch.inference_mode():
        with deferred():
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled()
        with pytest.raises(ZeroDivisionError), deferred():
            raise ZeroDivisionError
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_operations_that_autograd_splits_have_no_kernels_of_their_own_for_meta_tensors() -> None:
    """Else autograd does not split them for deferred tensors (aten/src/ATen/core/dispatch/OperatorEntry.cpp, 2.13)."""
    aten = torch.ops.aten
    for op in (
        aten.to.dtype,
        aten.reshape.default,
        aten.contiguous.default,
        aten.flatten.using_ints,
        aten.chunk.default,
    ):
        assert schema_of(op).is_composite
    for op in (aten.view.default, aten.add.Tensor, aten.empty.memory_format, aten._to_copy.default, aten.copy_.default):
        assert not schema_of(op).is_composite
    x = torch.ones(3, device="meta")
    assert not schema_of(aten.silu_backward.default).is_composite
    assert aten.silu_backward.default(x, x).is_meta


# -- ordinary tensors ----------------------------------------------------------------------------------------------


def test_gradients_stay_off_outside_of_the_mode() -> None:
    with outside_inference_mode():
        assert torch.is_grad_enabled()
    with torch.no_grad(), outside_inference_mode():
        assert not torch.is_grad_enabled()
    with torch.inference_mode(), outside_inference_mode():
        assert not torch.is_grad_enabled()
        assert not torch.ones(1).is_inference()


def test_an_ordinary_tensor_shares_the_memory_of_an_inference_tensor() -> None:
    with torch.inference_mode():
        tensors = [
            torch.arange(12.0).view(3, 4).t()[1:],
            torch.tensor([1 + 2j, 3 - 1j]).conj(),
            torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
            torch.tensor(3),
            torch.empty(0, 2),
        ]
    for tensor in tensors:
        twin = ordinary(tensor)
        assert tensor.is_inference()
        assert not twin.is_inference()
        assert torch.equal(twin, tensor)
        assert (twin.stride(), twin.is_conj(), twin.is_neg()) == (tensor.stride(), tensor.is_conj(), tensor.is_neg())
        assert twin.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        twin.mul_(2)
    with torch.inference_mode():
        sparse = torch.eye(3).to_sparse()
    assert not ordinary(sparse).is_inference()
    plain = torch.ones(2)
    assert ordinary(plain) is plain
