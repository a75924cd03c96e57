"""Saving and loading in `torch.inference_mode()` and `torch.no_grad()`: nothing loaded is an inference tensor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nucleate import Runtime
from tests.deferred.equality import bits, named_tensors
from tests.device import ACCELERATOR, device, on_device

Mode = Callable[[], AbstractContextManager[Any]]
MODES = pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, nullcontext])


class Average:
    """An object with a state of its own."""

    def __init__(self) -> None:
        self.mean = torch.zeros(3)

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean = state["mean"]


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4))


def trained(runtime: Runtime, seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    with runtime.init_module():
        original = build()
    model, optimizer = runtime.setup(original, torch.optim.Adam(original.parameters(), lr=0.1))
    step(runtime, model, optimizer)
    return model, optimizer


def step(runtime: Runtime, model: Any, optimizer: Any) -> None:
    runtime.backward(model(torch.ones(2, 3, device=device())).square().sum())
    optimizer.step()
    optimizer.zero_grad()


def tensors_of(state: dict[Any, Any]) -> list[Tensor]:
    return [value for fields in state.values() for value in fields.values() if isinstance(value, Tensor)]


@MODES
@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.parametrize("strategy", ["single_device", "ddp", "fsdp"])
def test_a_training_state_is_saved_and_goes_on(tmp_path: Path, strategy: str, stepped: bool, mode: Mode) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy=strategy)
    model, optimizer = trained(runtime, 0)
    average = Average()
    average.mean += 2
    with mode():
        state = {"model": model, "optimizer": optimizer, "average": average, "mark": torch.ones(2), "step": 3}
        runtime.save(tmp_path / "last", state)
    step(runtime, model, optimizer)
    expected = {name: tensor.clone() for name, tensor in named_tensors(model.module).items()}
    if not stepped:
        torch.manual_seed(1)
        with mode(), runtime.init_module():
            original = build()
        optimizer = torch.optim.Adam(original.parameters(), lr=0.1)
        with mode():
            model, optimizer = runtime.setup(original, optimizer)
    average = Average()
    with mode():
        report = runtime.load(
            tmp_path / "last", {"model": model, "optimizer": optimizer, "average": average}, remainder=True
        )
    assert not report["mark"].is_inference()
    report["mark"].add_(1)
    average.mean.add_(1)
    assert average.mean.tolist() == [3, 3, 3]
    assert not any(tensor.is_inference() for tensor in tensors_of(optimizer.state))
    step(runtime, model, optimizer)
    for name, tensor in named_tensors(model.module).items():
        assert torch.equal(tensor, expected[name]), name


@MODES
@pytest.mark.parametrize("how", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_weights_are_loaded_before_and_after_setup(tmp_path: Path, before: bool, how: bool, mode: Mode) -> None:
    weights = build().state_dict()
    save_file(weights, tmp_path / "m.safetensors")
    runtime = Runtime(accelerator=ACCELERATOR)
    with mode():
        with runtime.init_module(empty_init=how):
            model = build()
        if before:
            runtime.load_raw(tmp_path / "m.safetensors", model)
        wrapped = runtime.setup(model)
        if not before:
            runtime.load_raw(tmp_path / "m.safetensors", wrapped)
    for name, tensor in model.state_dict().items():
        assert bits(tensor) == bits(weights[name])
        assert not tensor.is_inference()
    step(runtime, wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1))


@MODES
def test_a_model_of_the_mode_and_tensors_of_a_user_are_filled_in_place(tmp_path: Path, mode: Mode) -> None:
    weights = build().state_dict()
    save_file({**weights, "1.bias": weights["1.bias"].double()}, tmp_path / "m.safetensors")
    runtime = Runtime(accelerator=ACCELERATOR)
    with torch.inference_mode(), on_device():
        model = build()
        model[0].weight.data = model[0].weight.data.t().contiguous().t()
        mine, turned = torch.zeros(4), torch.zeros(600, 600).t()
    values = torch.arange(360_000.0).view(600, 600)
    runtime.save(tmp_path / "state", {"mine": torch.arange(4.0), "turned": values})
    with mode():
        runtime.load_raw(tmp_path / "m.safetensors", model)
        runtime.load(tmp_path / "state", {"mine": mine, "turned": turned})
    assert mine.tolist() == [0, 1, 2, 3]
    assert torch.equal(turned.cpu(), values)
    assert all(bits(tensor) == bits(weights[name]) for name, tensor in model.state_dict().items())


@MODES
def test_a_meta_model_of_the_mode_is_bound_to_a_file(tmp_path: Path, mode: Mode) -> None:
    weights = build().state_dict()
    save_file(weights, tmp_path / "m.safetensors")
    with torch.inference_mode(), torch.device("meta"):
        model = build()
    runtime = Runtime(accelerator=ACCELERATOR)
    with mode():
        runtime.load_raw(tmp_path / "m.safetensors", model)
        wrapped = runtime.setup(model)
    assert all(bits(tensor) == bits(weights[name]) for name, tensor in model.state_dict().items())
    step(runtime, wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1))


@MODES
def test_a_module_that_loads_in_its_own_way_is_loaded(tmp_path: Path, mode: Mode) -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False)
            self.register_buffer("halved", torch.zeros(2, 3))

        def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
            both = state.pop(f"{prefix}both")
            state[f"{prefix}first.weight"], state[f"{prefix}second.weight"] = both.float().chunk(2)
            state[f"{prefix}halved"] = both[:3].t().reshape(2, 3).to(torch.float32)
            super()._load_from_state_dict(state, prefix, *args)

    both = torch.arange(12.0, dtype=torch.float64).view(6, 2)
    save_file({"both": both}, tmp_path / "m.safetensors")
    runtime = Runtime(accelerator=ACCELERATOR)
    with mode():
        with runtime.init_module(empty_init=True):
            model = Split()
        runtime.load_raw(tmp_path / "m.safetensors", model)
        runtime.setup(model)
    assert torch.equal(model.second.weight.cpu(), both[3:].float())
    assert torch.equal(model.halved.cpu(), both[:3].t().float())
    assert not any(tensor.is_inference() for tensor in named_tensors(model).values())


@MODES
def test_parameters_that_a_load_makes_are_trained(tmp_path: Path, mode: Mode) -> None:
    class Grown(nn.Linear):
        def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
            self.weight = nn.Parameter(torch.empty_like(state[f"{prefix}weight"]))
            super()._load_from_state_dict(state, prefix, *args)

    weights = nn.Linear(3, 2).state_dict()
    save_file(weights, tmp_path / "m.safetensors")
    with on_device():
        models = [nn.LazyLinear(2), Grown(1, 2)]
    for model in models:
        with mode():
            Runtime(accelerator=ACCELERATOR).load_raw(tmp_path / "m.safetensors", model)
        assert bits(model.weight) == bits(weights["weight"])
        assert not any(parameter.is_inference() for parameter in model.parameters())
        model.to(device())(torch.ones(2, 3, device=device())).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
