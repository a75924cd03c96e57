"""Lightning Fabric's lazy checkpoints inside `init_module`: nothing is read before `setup`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric.utilities import load as fabric
from torch import nn

from nucleate import Integration, Runtime
from nucleate.deferred import record_of
from nucleate.deferred.elements import lazy_tensor
from nucleate.errors import CheckpointError
from nucleate.integrations.lazy_tensors import LazyTensors
from nucleate.testing import IntegrationSuite
from tests.device import cpu_only
from tests.integrations.weights import PRECISIONS, assert_loads, build, early, weights, write_in_place

pytestmark = cpu_only("what a library loads for the CPU is bound to its file where the CPU is recorded for")


class TestLazyTensors(IntegrationSuite):
    loads = True

    def make_integration(self) -> Integration:
        return LazyTensors()

    def construct(self) -> nn.Module:
        return build()

    def store(self, model: nn.Module, folder: Path) -> None:
        torch.save(model.state_dict(), folder / "model.pt")

    def load(self, folder: Path) -> nn.Module:
        model = build()
        model.load_state_dict(fabric._lazy_load(folder / "model.pt"))
        return model


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(accelerator="cpu", strategy="single_device")


KINDS = {
    "tensors": lambda value: value,
    "parameters": nn.Parameter,
    "transposed": lambda value: value.t().contiguous().t() if value.dim() == 2 else value,
}


@pytest.fixture(params=KINDS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kind: Any = KINDS[request.param]
    torch.save({name: kind(value) for name, value in weights().items()}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the library reads a record of a tensor."""
    monkeypatch.setattr(
        fabric._NotYetLoadedTensor, "_load_tensor", lambda self: pytest.fail("it was read by its library")
    )


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_parameters_stay_deferred_and_get_the_files_values(path: Path, precision: str, inside: bool) -> None:
    opened = fabric._lazy_load(path)
    assert_loads(
        lambda model: model.load_state_dict(fabric._lazy_load(path) if inside else opened), weights(), precision
    )


@pytest.mark.usefixtures("unread")
@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_lazy_state_dict_stays_lazy_outside_of_the_block(path: Path, precision: str) -> None:
    runtime = Runtime(accelerator="cpu", strategy="single_device", precision=precision)
    with runtime.init_module(empty_init=True):
        model = build()
    model.load_state_dict(fabric._lazy_load(path))
    assert early(model) == []
    found = runtime.setup(model).state_dict()
    for name, value in weights().items():
        assert torch.equal(found[name], value.to(PRECISIONS[precision])), name


def test_what_is_done_to_a_lazy_tensor_is_recorded(path: Path, runtime: Runtime) -> None:
    lazy = fabric._lazy_load(path)
    holder = nn.Module()
    with runtime.init_module(empty_init=True):
        first = lazy["0.weight"]
        for name, value in {
            "cast": first.to(torch.float64),
            "data": first.data,
            "sum": torch.add(first, 1),
            "both": torch.stack([first.contiguous(), first.half().float()]),
        }.items():
            assert record_of(value) is not None
            holder.register_buffer(name, value)
    made = dict(runtime.setup(holder).named_buffers())
    weight = weights()["0.weight"]
    assert torch.equal(made["cast"], weight.double())
    assert torch.equal(made["data"], weight)
    assert made["data"].stride() == first.metatensor.stride()
    assert torch.equal(made["sum"], weight + 1)
    assert torch.equal(made["both"], torch.stack([weight, weight.half().float()]))


def test_it_is_read_by_its_library_where_the_file_cannot_be_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_tensor, "_find", lambda reader: None)
    assert_loads(lambda model: model.load_state_dict(fabric._lazy_load(path)), weights())


def test_nothing_changes_where_nothing_is_deferred(path: Path, runtime: Runtime) -> None:
    lazy = fabric._lazy_load(path)
    before = dict(vars(fabric._NotYetLoadedTensor))
    with runtime.init_module(empty_init=True), runtime.init_module(empty_init=False):
        inside = lazy["0.weight"].to(torch.float64)
    assert record_of(inside) is None
    assert torch.equal(inside, weights()["0.weight"].double())
    assert dict(vars(fabric._NotYetLoadedTensor)) == before
    assert torch.equal(torch.add(lazy["0.weight"], 0), weights()["0.weight"])


def test_a_file_that_is_written_before_setup_is_an_error_that_names_it(path: Path, runtime: Runtime) -> None:
    with runtime.init_module(empty_init=True):
        model = build()
        model.load_state_dict(fabric._lazy_load(path))
    write_in_place(path)
    with pytest.raises(CheckpointError, match=r"(?s)model.pt was written to.*weight"):
        runtime.setup(model)
