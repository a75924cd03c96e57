"""`32-true`, `64-true`, `bf16-true` and `16-true`."""

import pytest
import torch
from torch import nn

from nucleate.accelerators import CPUAccelerator
from nucleate.cluster import Environment
from nucleate.devices import DeviceHooks, table
from nucleate.errors import ConfigurationError
from nucleate.plugin import Composition
from nucleate.precision import FullPrecision, HalfPrecision, Precision
from nucleate.registry import PRECISIONS

pytestmark = pytest.mark.usefixtures("factories_on_device")

NAMES = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}


def create(name: str) -> Precision:
    precision = PRECISIONS.create(name)
    assert isinstance(precision, Precision)
    return precision


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_made_and_kept_in_the_dtype(name: str) -> None:
    precision, dtype = create(name), NAMES[name]
    assert precision.name == name
    assert precision.dtype == dtype
    with precision.module_init_context():
        model = nn.Linear(2, 2)
    assert model.weight.dtype == dtype
    other = precision.setup(nn.Linear(2, 2))
    assert other.weight.dtype == dtype
    assert not precision.scales_gradients


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_and_a_backward_run(name: str) -> None:
    precision = create(name)
    model = precision.setup(nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)))
    with precision.forward_context():
        output = model(precision.convert_input(torch.randn(2, 2, 5)))
    output = precision.convert_output(output)
    assert output.dtype == (torch.float64 if name == "64-true" else torch.float32)
    precision.scale(output.sum()).backward()
    assert model[0].weight.grad.dtype == NAMES[name]


def test_forward_of_a_double_model_makes_double_tensors() -> None:
    with FullPrecision(torch.float64).forward_context():
        assert torch.zeros(1).dtype == torch.float64
    assert torch.zeros(1).dtype == torch.float32


def test_forward_of_a_half_model_makes_unrounded_tables() -> None:
    with HalfPrecision().forward_context():
        assert (torch.arange(3) / 3).dtype == torch.float32


def test_a_class_names_itself_after_its_dtype() -> None:
    assert HalfPrecision(torch.float16).name == "16-true"
    assert FullPrecision().name == "32-true"


def test_other_dtypes_and_names_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="not torch.bfloat16"):
        FullPrecision(torch.bfloat16)
    with pytest.raises(ConfigurationError, match="not torch.float32"):
        HalfPrecision(torch.float32)
    with pytest.raises(ConfigurationError, match="no variant '8-true'"):
        HalfPrecision.from_name("8-true")
    with pytest.raises(ConfigurationError, match="no variant '16-true'; it has 32-true and 64-true"):
        FullPrecision.from_name("16-true")


def test_bfloat16_is_refused_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class OldCard(DeviceHooks):
        def supports_bfloat16(self, device: torch.device) -> bool:
            return False

        def describe(self, device: torch.device) -> str:
            return "an old card"

    monkeypatch.setattr(table, "_chosen", {"cuda": OldCard()})
    precision = HalfPrecision()
    parts = Composition(CPUAccelerator(), precision, CPUAccelerator(), Environment(), torch.device("cuda", 0))
    with pytest.raises(ConfigurationError, match="'bf16-true' needs bfloat16, which an old card does not have"):
        precision.check(parts)
    HalfPrecision(torch.float16).check(parts)
