"""The search for equal inputs: which inputs count as equal, and which are not looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nucleate.cluster import Environment
from nucleate.cluster.tally import Tally
from nucleate.wrappers.deliveries import Deliveries
from nucleate.wrappers.equal_inputs import EqualInputs

MIB = 2**20


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The values that a rank reports to the others."""
    found: list[str] = []
    monkeypatch.setattr(Tally, "completes", lambda _, value: found.append(value))
    return found


def look(reported: list[str], *args: Any, **kwargs: Any) -> str:
    """Return the hash of the inputs of a first forward, or `""` if they are not looked at."""
    reported.clear()
    EqualInputs("Net", Tally(Environment()), 2, Deliveries()).look((args, kwargs))
    return reported[0] if reported else ""


def numbers() -> Tensor:
    return torch.arange(24.0).view(4, 6) - 7


def changed(place: tuple[int, int], by: float) -> Tensor:
    tensor = numbers()
    tensor[place] += by
    return tensor


@pytest.mark.parametrize(
    "other",
    [
        numbers,
        lambda: numbers().T.contiguous().T,
        lambda: torch.cat([torch.zeros(1, 6), numbers()])[1:],
        lambda: numbers().requires_grad_(),
        lambda: nn.Parameter(numbers()),
        lambda: torch.complex(torch.zeros(4, 6), -numbers()).conj().imag,
    ],
    ids=["new", "strides", "offset", "gradient", "parameter", "negative bit"],
)
def test_equal_values_have_one_hash(reported: list[str], other: Any) -> None:
    mine = look(reported, numbers(), mask=[torch.ones(2, dtype=torch.bool), None], scale=2.5)
    assert mine
    assert look(reported, other(), mask=[torch.ones(2, dtype=torch.bool), None], scale=2.5) == mine


def different_inputs() -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    yield (changed((3, 5), 2**-10),), {}
    yield (changed((0, 0), 2**-20),), {}
    yield (numbers().double(),), {}
    yield (numbers().view(torch.int32),), {}
    yield (numbers().view(6, 4),), {}
    yield (numbers().flip(0),), {}
    yield (numbers(), torch.empty(0)), {}
    yield (numbers()[:2], numbers()[2:]), {}
    yield ([numbers()],), {}
    yield ((numbers(),),), {}
    yield (), {"x": numbers()}
    yield (), {"y": numbers()}
    yield (numbers(), 1), {}
    yield (numbers(), 1.0), {}
    yield (numbers(), "1"), {}
    yield (numbers(), True), {}
    yield (numbers(), None), {}
    yield (numbers(),), {"scale": 1}
    yield (numbers().to(torch.complex64),), {}
    yield (numbers().to(torch.complex64).conj() * 1j,), {}


def test_other_values_types_and_places_have_other_hashes(reported: list[str]) -> None:
    found = [look(reported, *args, **kwargs) for args, kwargs in [((numbers(),), {}), *different_inputs()]]
    assert all(found)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.bool, torch.int64], ids=str
)
def test_every_dtype_has_a_hash_of_its_values(reported: list[str], dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 1.0, 0.0]).to(dtype)
    others = torch.tensor([0.0, 1.0, 1.0]).to(dtype)
    assert look(reported, values) == look(reported, values.clone()) != look(reported, others)


class Own(Tensor):
    """A tensor whose values only its class knows."""


@pytest.mark.parametrize(
    "unknown",
    [
        (),
        ("text", 3),
        (torch.empty(0),),
        (numbers(), object()),
        (numbers().as_subclass(Own),),
        (numbers().to_sparse(),),
        (torch.empty(3, device="meta"),),
        (torch.zeros(16 * MIB + 1, dtype=torch.uint8),),
        (torch.zeros(9 * MIB, dtype=torch.uint8), torch.zeros(2 * MIB, dtype=torch.float32)),
    ],
    ids=["nothing", "plain", "empty", "object", "class", "sparse", "meta", "large", "large together"],
)
def test_unknown_values_and_large_ones_are_not_looked_at(reported: list[str], unknown: tuple[Any, ...]) -> None:
    assert look(reported, *unknown) == ""


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
def test_quantized_values_are_not_looked_at(reported: list[str]) -> None:
    assert look(reported, torch.quantize_per_tensor(numbers(), 0.1, 0, torch.qint8)) == ""


def test_tensors_inside_of_a_transformation_are_not_looked_at(reported: list[str]) -> None:
    found = []
    torch.func.vmap(lambda row: found.append(look(reported, row)) or row)(numbers())
    assert found == [""]


def test_forwards_of_different_steps_are_not_equal(reported: list[str]) -> None:
    inputs = EqualInputs("Net", Tally(Environment()), 2, Deliveries())
    goes_on = [inputs.look(((numbers(),), {})) for _ in range(3)]
    assert len(set(reported)) == 3
    assert goes_on == [True, True, False]
