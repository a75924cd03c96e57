"""What a cast touches, and what it leaves alone."""

from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from nucleate.precision.casting import cast_parameters, convert, default_dtype

pytestmark = pytest.mark.usefixtures("factories_on_device")

Pair = namedtuple("Pair", ["first", "second"])


@dataclass(frozen=True)
class Frozen:
    tensor: torch.Tensor
    other: Any = None
    derived: int = field(default=0, init=False)


def test_the_default_dtype_is_restored_after_an_error() -> None:
    with default_dtype(torch.float64):
        assert torch.empty(1).dtype == torch.float64
    with pytest.raises(ZeroDivisionError), default_dtype(torch.float64):
        _ = 1 / 0
    assert torch.get_default_dtype() == torch.float32


def test_parameters_stay_the_same_objects_and_ties_hold() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    before = list(model.parameters())
    cast_parameters(model, torch.bfloat16)
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
    assert all(parameter.dtype == torch.bfloat16 for parameter in before)
    assert model[1].weight is model[0].weight


def test_parameters_that_share_a_storage_still_share_one() -> None:
    whole = torch.arange(12.0).view(3, 4)
    model = nn.Module()
    model.whole, model.transposed = nn.Parameter(whole), nn.Parameter(whole.t())
    model.column = nn.Parameter(whole[:, 2])
    cast_parameters(model, torch.bfloat16)
    with torch.no_grad():
        model.transposed[2, 1] = 99
    assert model.whole[1, 2] == 99
    assert model.column.tolist() == [2, 99, 10]
    assert model.whole.dtype == model.column.dtype == torch.bfloat16


def test_gradients_are_cast_with_their_parameters() -> None:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    cast_parameters(model, torch.float64)
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == torch.float64


def test_integers_and_buffers_are_kept() -> None:
    model = nn.Module()
    model.codes = nn.Parameter(torch.arange(3), requires_grad=False)
    model.register_buffer("inv_freq", torch.rand(3))
    cast_parameters(model, torch.bfloat16)
    assert model.codes.dtype == torch.int64
    assert model.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batch_norm_works_after_the_cast(dtype: torch.dtype) -> None:
    model = nn.BatchNorm2d(3)
    mean = model.running_mean
    cast_parameters(model, dtype)
    assert model.running_mean is mean
    model(torch.randn(2, 3, 4, 4, dtype=dtype)).sum().backward()
    model.eval()(torch.randn(2, 3, 4, 4, dtype=dtype))


def test_batch_norm_kernels_refuse_statistics_of_another_dtype() -> None:
    """The fact that the exception in `cast_parameters` rests on."""
    model = nn.BatchNorm2d(3).to(torch.bfloat16)
    model.running_mean = torch.zeros(3)
    model.running_var = torch.ones(3)
    with pytest.raises(RuntimeError, match="expected scalar type BFloat16 but found Float"):
        model(torch.randn(2, 3, 4, 4, dtype=torch.bfloat16))


def test_floating_point_tensors_are_converted_wherever_they_are() -> None:
    one = torch.ones(1)
    data = {
        "list": [one, (one, "text")],
        "pair": Pair(one, None),
        "frozen": Frozen(one, other=[one]),
        "ordered": OrderedDict(a=one),
        "default": defaultdict(list, b=one),
        "packed": PackedSequence(one, torch.ones(1, dtype=torch.int64, device="cpu")),
        "integers": torch.arange(3),
        "float8": one.to(torch.float8_e4m3fn),
        "range": range(3),
        "bytes": b"abc",
        "size": one.shape,
    }
    got = convert(data, torch.float64)
    assert got["list"][0].dtype == got["list"][1][0].dtype == torch.float64
    assert got["pair"].first.dtype == got["frozen"].tensor.dtype == got["frozen"].other[0].dtype == torch.float64
    assert isinstance(got["ordered"], OrderedDict)
    assert got["ordered"]["a"].dtype == torch.float64
    assert got["default"]["new"] == []
    assert got["packed"].data.dtype == torch.float64
    assert got["integers"] is data["integers"]
    assert got["float8"] is data["float8"]
    assert got["range"] == range(3)
    assert got["bytes"] == b"abc"
    assert data["list"][0].dtype == torch.float32  # type: ignore[index]


def test_what_needs_no_cast_is_the_same_object() -> None:
    cache: list[Any] = []
    data = {"cache": cache, "tensor": torch.ones(1), "kept": {"a": 1}}
    assert convert(data, torch.float32) is data
    assert convert(data, torch.float64)["cache"] is cache


def test_the_parts_of_a_complex_tensor_keep_their_signs_and_their_memory() -> None:
    whole = torch.complex(torch.arange(3.0), torch.arange(3.0) + 1)
    model = nn.Module()
    model.imaginary = nn.Parameter(whole.conj().imag)
    model.real = nn.Parameter(whole.real)
    model.alone = nn.Parameter(whole.clone().conj().imag)
    assert model.imaginary.is_neg()
    cast_parameters(model, torch.bfloat16)
    assert model.real.tolist() == [0, 1, 2]
    assert model.imaginary.tolist() == model.alone.tolist() == [-1, -2, -3]
    assert model.imaginary.untyped_storage().data_ptr() == model.real.untyped_storage().data_ptr()


def test_complex_numbers_are_kept() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))
    cast_parameters(model, torch.bfloat16)
    assert model.weight.dtype == torch.complex64
    assert convert(model.weight, torch.float64) is model.weight
