"""A live layout follows a model that trains, refuses parameters that came later, and keeps nothing alive."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate.errors import UsageError
from nucleate.layout import LiveLayout


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.extra = nn.Linear(4, 4), nn.Linear(4, 2), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x))
        return out


def trained() -> tuple[Runtime, Any]:
    runtime = Runtime(accelerator="cpu", strategy="single_device")
    with runtime.init_module(empty_init=True):
        model = Net()
    return runtime, runtime.setup(model)


def assign_a_module(model: Net) -> None:
    model.head = nn.Linear(4, 2)


def assign_a_parameter(model: Net) -> None:
    model.head.weight = nn.Parameter(torch.ones(2, 4))


def add_a_module(model: Net) -> None:
    model.add_module("head", nn.Linear(4, 2))


def set_a_submodule(model: Net) -> None:
    model.set_submodule("head", nn.Linear(4, 2))


def write_into_the_registry(model: Net) -> None:
    model.head._parameters["weight"] = nn.Parameter(torch.ones(2, 4))


def register_a_parameter(model: Net) -> None:
    model.head.register_parameter("gain", nn.Parameter(torch.ones(2)))


def fill_an_empty_place(model: Net) -> None:
    del model.extra
    model.extra = nn.Linear(4, 2)  # type: ignore[assignment]


def parametrize(model: Net) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.head)


DOORS: dict[Callable[[Net], None], str] = {
    assign_a_module: "head.weight, head.bias",
    assign_a_parameter: "head.weight came",
    add_a_module: "head.weight, head.bias",
    set_a_submodule: "head.weight, head.bias",
    write_into_the_registry: "head.weight came",
    register_a_parameter: "head.gain came",
    fill_an_empty_place: "extra.weight, extra.bias",
    parametrize: "head.parametrizations.weight.original",
}


@pytest.mark.parametrize("change", DOORS, ids=lambda change: change.__name__)
def test_parameters_that_came_after_setup_are_refused_by_name_whatever_door_they_came_through(
    change: Callable[[Net], None],
) -> None:
    runtime, model = trained()
    loss = model(torch.ones(1, 4)).sum()
    change(model.module)
    with pytest.raises(UsageError, match=DOORS[change]):
        runtime.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UsageError, match=DOORS[change]):
        model(torch.ones(1, 4))
    with pytest.raises(UsageError, match=DOORS[change]):
        runtime.layout(model)
    runtime, model = trained()
    loss = model.module(torch.ones(1, 4)).sum()
    change(model.module)
    with pytest.raises(UsageError, match=DOORS[change]):
        runtime.backward(loss)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_change_through_the_wrapper_is_refused_as_well() -> None:
    _, model = trained()
    model.head = nn.Linear(4, 2)
    with pytest.raises(UsageError, match="head.weight, head.bias"):
        model(torch.ones(1, 4))


def test_inference_with_a_changed_model_is_allowed() -> None:
    _, model = trained()
    model.head = nn.Linear(4, 3)
    with torch.no_grad():
        assert model(torch.ones(1, 4)).shape == (1, 3)


def test_freezing_removing_and_buffers_are_followed() -> None:
    runtime, model = trained()
    assert runtime.layout(model).trained == ("body.weight", "body.bias", "head.weight", "head.bias")
    model.module.body.requires_grad_(False)
    model.module.register_buffer("table", torch.arange(3))
    layout = runtime.layout(model)
    assert layout.trained == ("head.weight", "head.bias")
    assert layout["table"].is_buffer
    model.module.head.bias = None
    runtime.backward(model(torch.ones(1, 4)).sum())
    assert list(runtime.layout(model)) == ["body.weight", "body.bias", "head.weight", "table"]


def test_a_copy_has_a_layout_of_its_own() -> None:
    _, model = trained()
    average = copy.deepcopy(model)
    runtime_sees_no_fault = average(torch.ones(1, 4)).sum()
    assert runtime_sees_no_fault.requires_grad
    average.module.head = nn.Linear(4, 2)
    with pytest.raises(UsageError, match="head.weight"):
        average(torch.ones(1, 4))
    model(torch.ones(1, 4))


def test_a_model_and_its_layout_are_freed_together() -> None:
    model: Any = Net()
    live = LiveLayout(model, 1)
    references = [weakref.ref(model), *(weakref.ref(parameter) for parameter in model.parameters())]
    assert live.name_of(model.head.bias) == "head.bias"
    assert live.name_of(nn.Parameter(torch.ones(2))) is None
    del model, live
    gc.collect()
    assert not any(reference() for reference in references)


def test_a_parameter_that_became_empty_is_refused_by_save_and_clip_gradients(tmp_path: Any) -> None:
    runtime, model = trained()
    optimizer = runtime.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    runtime.backward(model(torch.ones(1, 4)).sum())
    model.module.head.weight.data = torch.empty(0)
    with pytest.raises(UsageError, match="save needs the values of head.weight"):
        runtime.save(tmp_path / "a.safetensors", {"model": model})
    with pytest.raises(UsageError, match="clip_gradients needs the values of head.weight"):
        runtime.clip_gradients(model, optimizer, max_norm=1.0)
    assert not (tmp_path / "a.safetensors").exists()


def test_a_model_that_was_not_set_up_has_no_layout() -> None:
    runtime, _ = trained()
    with pytest.raises(UsageError, match="Net has no layout"):
        runtime.layout(Net())
