"""After `setup` no tensor of a model is an inference tensor, whatever the mode in which it was built and set up."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.deferred import deferred
from nucleate.errors import UsageError
from nucleate.materialize import materialize, reset
from nucleate.materialize.inference_tensors import replace_inference_tensors
from tests.deferred.equality import assert_same_model, bits, named_attributes, named_tensors
from tests.device import ACCELERATOR, cpu_only, device, lstm_runs_in, on_device

Mode = Callable[[], AbstractContextManager[Any]]
STRATEGIES = ["single_device", "ddp", "fsdp"]
# The model has an LSTM.
PRECISIONS = ["32-true", "bf16-true", *(["bf16-mixed"] if lstm_runs_in(torch.bfloat16) else [])]


class Model(nn.Module):
    """Large enough for `init_module()` without `empty_init` to defer a part."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)
        self.large = nn.Linear(1500, 1500)
        self.lstm = nn.LSTM(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.line.weight
        self.register_buffer("table", torch.arange(4).float() / 2)
        self.register_buffer("part", self.table[1:])
        self.register_buffer("given", torch.tensor([1.0, 2.0]))
        self.parts = [torch.ones(4).double().float(), {"deep": torch.rand(2)}]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.line(x) * self.table.to(x.dtype)) + self.parts[0].to(x.dtype)
        more = self.large(self.large.weight[:1]).mean() + self.given.sum().to(x.dtype)
        return self.head(self.lstm(hidden[None])[0][0]) + more


class Inner(Model):
    @torch.inference_mode()
    def __init__(self) -> None:
        super().__init__()


def everything(model: nn.Module) -> list[Tensor]:
    return [*named_tensors(model).values(), *named_attributes(model).values()]


def is_inference(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.is_inference()


def build(make: Callable[[], nn.Module] = Model) -> nn.Module:
    torch.manual_seed(0)
    return make()


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def x() -> Tensor:
    return torch.arange(8.0, device=device()).view(2, 4)


def assert_ordinary_and_trained(runtime: Runtime, wrapped: Any, optimizer: Any) -> None:
    assert not any(tensor.is_inference() for tensor in everything(wrapped.module))
    bias = wrapped.module.head.bias
    before = bits(whole(bias))
    for _ in range(2):
        runtime.backward(wrapped(x()).square().sum())
        optimizer.step()
        optimizer.zero_grad()
    assert bits(whole(bias)) != before
    wrapped.module.table.add_(1)


@cpu_only("the model is large")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("how", [True, False, None])
@pytest.mark.parametrize("make", [Model, Inner])
@pytest.mark.parametrize(
    ("around", "at_setup"),
    [
        (torch.inference_mode, nullcontext),
        (torch.inference_mode, torch.inference_mode),
        (nullcontext, torch.inference_mode),
        (torch.no_grad, torch.no_grad),
        (nullcontext, nullcontext),
    ],
    ids=["around construction", "around both", "around setup", "no_grad around both", "nowhere"],
)
def test_a_model_of_init_module_is_exact_and_trained(
    around: Mode, at_setup: Mode, make: Callable[[], nn.Module], how: bool | None, strategy: str
) -> None:
    with torch.no_grad():
        expected = build()
    runtime = Runtime(accelerator=ACCELERATOR, strategy=strategy)
    with around(), runtime.init_module(empty_init=how):
        model = build(make)
    if make is Model:
        assert not any(is_inference(tensor) for tensor in everything(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with at_setup():
        wrapped, wrapped_optimizer = runtime.setup(model, optimizer)
    if strategy == "fsdp":
        assert bits(whole(model.line.weight)) == bits(expected.line.weight)
        assert bits(model.table) == bits(expected.table)
    else:
        model.__class__ = Model
        assert_same_model(expected, model)
    assert_ordinary_and_trained(runtime, wrapped, wrapped_optimizer)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("at_setup", [nullcontext, torch.inference_mode])
def test_a_real_model_that_was_built_in_the_mode_is_trained(at_setup: Mode, strategy: str, precision: str) -> None:
    with torch.inference_mode(), on_device():
        model = build()
    assert all(tensor.is_inference() for tensor in everything(model))
    held = {name: (tensor, bits(tensor)) for name, tensor in named_tensors(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    runtime = Runtime(accelerator=ACCELERATOR, strategy=strategy, precision=precision)
    with at_setup():
        wrapped, wrapped_optimizer = runtime.setup(model, optimizer)
    if strategy != "fsdp" and precision != "bf16-true":
        for name, tensor in named_tensors(model).items():
            assert tensor is held[name][0], name
            assert bits(tensor) == held[name][1], name
    assert model.head.weight is model.line.weight
    assert_ordinary_and_trained(runtime, wrapped, wrapped_optimizer)


def test_memory_attributes_and_classes_stay() -> None:
    class Own(nn.Parameter):
        pass

    with torch.inference_mode(), on_device():
        model = build()
        model.own = Own(torch.ones(2), requires_grad=False)
        model.own.mark = "kept"
    addresses = {name: tensor.data_ptr() for name, tensor in named_tensors(model).items()}
    materialize(model, device())
    assert {name: tensor.data_ptr() for name, tensor in named_tensors(model).items()} == addresses
    assert type(model.own) is Own
    assert (model.own.mark, model.own.requires_grad) == ("kept", False)
    assert not model.parts[1]["deep"].is_inference()
    model.table.fill_(3)
    assert bool((model.part == 3).all()), "memory is shared no more"


def test_a_tensor_that_torch_does_not_swap_is_replaced_in_the_model() -> None:
    with torch.inference_mode(), on_device():
        model = build()
    reference = weakref.ref(model.line.weight)
    value = bits(model.line.weight)
    runtime = Runtime(accelerator=ACCELERATOR)
    wrapped, optimizer = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert model.line.weight is not reference()
    assert model.head.weight is model.line.weight
    assert bits(model.line.weight) == value
    assert_ordinary_and_trained(runtime, wrapped, optimizer)


def test_other_models_are_left_alone() -> None:
    model = build()
    before = copy.copy(model.__dict__), [id(tensor) for tensor in everything(model)]
    replace_inference_tensors(model)
    assert before == (model.__dict__, [id(tensor) for tensor in everything(model)])


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("call", ["setup", "materialize", "reset"])
def test_a_model_that_was_built_on_meta_in_the_mode_is_initialized(call: str, mode: Mode) -> None:
    with torch.inference_mode(), torch.device("meta"):
        model: Any = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    torch.manual_seed(0)
    expected = torch.empty(3, 3, device=device())
    nn.init.kaiming_uniform_(expected, a=5**0.5)
    torch.manual_seed(0)
    with mode():
        if call == "setup":
            Runtime(accelerator=ACCELERATOR).setup(model)
        else:
            if call == "reset":
                reset(model, device())
            materialize(model, device())
    assert bits(model[0].weight) == bits(expected)
    assert not any(tensor.is_inference() for tensor in named_tensors(model).values())


def test_sparse_and_quantized_inference_tensors_are_copied() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("sparse", torch.eye(3).to_sparse())
            self.line = nn.Linear(2, 2)

    with torch.inference_mode():
        model = Odd()
    values = model.sparse.to_dense()
    materialize(model)
    assert not model.sparse.is_inference()
    assert torch.equal(model.sparse.to_dense(), values)


def test_inside_of_its_constructor_a_model_is_refused() -> None:
    with deferred(), pytest.raises(UsageError, match="End the `init_module` block first"):
        replace_inference_tensors(nn.Linear(2, 2))
