"""`no-cast`, the precision of a `Runtime` without a choice: the model's own dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.deferred import record_of
from nucleate.precision import NoCastPrecision
from nucleate.precision.casting import default_dtype
from tests.device import ACCELERATOR

pytestmark = pytest.mark.usefixtures("factories_on_device")


class ManyDtypes(nn.Module):
    """A model whose constructor chooses a dtype for each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(4, 4)
        self.low = nn.Parameter(torch.randn(4, dtype=torch.bfloat16))
        self.high = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.waves = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.register_buffer("table", torch.arange(4, dtype=torch.float16))
        self.norm = nn.BatchNorm1d(4, dtype=torch.bfloat16)
        self.seen: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((args, kwargs))
        return args[0]


DTYPES = {
    "plain.weight": torch.float32,
    "plain.bias": torch.float32,
    "low": torch.bfloat16,
    "high": torch.float64,
    "waves": torch.complex64,
    "table": torch.float16,
    "norm.weight": torch.bfloat16,
    "norm.bias": torch.bfloat16,
    "norm.running_mean": torch.bfloat16,
    "norm.running_var": torch.bfloat16,
    "norm.num_batches_tracked": torch.int64,
}


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "choice", [{}, {"precision": None}, {"precision": "no-cast"}, {"precision": NoCastPrecision()}]
)
def test_it_is_what_a_runtime_has_that_is_given_no_precision(choice: dict[str, Any]) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device", **choice)
    assert type(runtime.precision) is NoCastPrecision
    assert runtime.precision.name == "no-cast"
    assert repr(runtime) == f"Runtime({runtime.accelerator.name}, single_device, no-cast)"


@pytest.mark.parametrize("empty_init", [True, False, None])
@pytest.mark.parametrize("strategy", ["single_device", "ddp"])
def test_parameters_and_buffers_keep_the_dtypes_of_the_constructor(strategy: str, empty_init: bool | None) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy=strategy)
    torch.manual_seed(3)
    eager = ManyDtypes()
    torch.manual_seed(3)
    with runtime.init_module(empty_init=empty_init):
        model = ManyDtypes()
    state = runtime.setup(model).state_dict()
    assert dtypes_of(eager) == DTYPES
    for name, tensor in eager.state_dict().items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("strategy", ["single_device", "ddp", "fsdp"])
@pytest.mark.parametrize("cast", ["in the block", "between", "outside"])
def test_a_model_in_bfloat16_stays_and_trains_in_bfloat16(strategy: str, cast: str) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy=strategy)
    if cast == "outside":
        model: nn.Module = nn.Linear(4, 4).to(torch.bfloat16)
    else:
        with runtime.init_module(empty_init=True):
            model = nn.Linear(4, 4, dtype=torch.bfloat16 if cast == "in the block" else None)
        model.to(torch.bfloat16)
    model, optimizer = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    output = model(torch.ones(2, 4, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    runtime.backward(output.sum())
    optimizer.step()
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert parameter.dtype == torch.bfloat16
        assert not torch.equal(parameter, value)


def test_recipes_get_no_casts() -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device")
    with runtime.init_module(empty_init=True):
        model = ManyDtypes()
    record = record_of(model.low)
    assert record is not None
    num_steps = len(record.tape.steps)
    runtime.setup(model)
    assert len(record.tape.steps) == num_steps


def test_inputs_and_outputs_are_passed_on_as_they_are() -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device")
    model = runtime.setup(ManyDtypes())
    data = {"x": [torch.ones(2, dtype=torch.float64)], "half": torch.ones(2, dtype=torch.float16)}
    assert model(data, other=data) is data
    [((given,), named)] = model.seen
    assert given is data
    assert named["other"] is data


class Walked(list[Tensor]):
    """A collection that refuses to be walked."""

    def __iter__(self) -> Any:
        raise AssertionError("the input was walked")


def test_inputs_are_not_walked() -> None:
    model = Runtime(accelerator=ACCELERATOR, strategy="single_device").setup(ManyDtypes())
    walked = Walked([torch.ones(1)])
    assert model(walked) is walked


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
def test_the_default_dtype_stays_as_it_is(default: torch.dtype) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device")
    with default_dtype(default):
        assert runtime.precision.dtype == default
        with runtime.init_module(empty_init=True):
            assert torch.get_default_dtype() == default
            model = nn.Linear(2, 2)
        with runtime.init_tensor():
            assert torch.ones(1).dtype == default
        with runtime.autocast():
            assert torch.get_default_dtype() == default
    assert runtime.setup(model).weight.dtype == default


def test_a_mismatch_of_the_users_own_dtypes_is_torchs_own_error() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 2, dtype=torch.bfloat16)
            self.register_buffer("table", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x + self.table)

    model = Runtime(accelerator=ACCELERATOR, strategy="single_device").setup(Mixed())
    with pytest.raises(RuntimeError, match="dtype") as raised:
        model(torch.ones(1, 4, dtype=torch.bfloat16))
    assert type(raised.value) is RuntimeError
