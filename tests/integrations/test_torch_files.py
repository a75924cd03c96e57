"""`torch.load` inside `init_module`: state dicts are bound to the file, all else is torch's."""

from __future__ import annotations

import argparse
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nucleate import Integration, Runtime
from nucleate.deferred import record_of
from nucleate.errors import CheckpointError
from nucleate.integrations.torch_files import TorchFiles
from nucleate.testing import IntegrationSuite
from tests.device import cpu_only
from tests.integrations.weights import PRECISIONS, assert_loads, build, early, weights, write_in_place

pytestmark = cpu_only("what a library loads for the CPU is bound to its file where the CPU is recorded for")


# Looking at all names of torch meets those that are deprecated.
@pytest.mark.filterwarnings("ignore:.*is deprecated")
class TestTorchFiles(IntegrationSuite):
    loads = True

    def make_integration(self) -> Integration:
        return TorchFiles()

    def construct(self) -> nn.Module:
        return build()

    def store(self, model: nn.Module, folder: Path) -> None:
        torch.save(model.state_dict(), folder / "model.pt")

    def load(self, folder: Path) -> nn.Module:
        model = build()
        model.load_state_dict(torch.load(folder / "model.pt"))
        return model


LOADS: dict[str, Callable[[Path], Any]] = {
    "defaults": lambda path: torch.load(path),
    "path as text": lambda path: torch.load(str(path), "cpu"),
    "weights only": lambda path: torch.load(path, map_location=torch.device("cpu"), weights_only=True),
    "not weights only": lambda path: torch.load(path, weights_only=False),
    "mapped": lambda path: torch.load(path, mmap=True, map_location="cpu"),
    "by its module": lambda path: torch.serialization.load(path),
}


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(accelerator="cpu", strategy="single_device")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save(weights(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_all_parameters_stay_deferred_and_get_the_files_values(
    path: Path, load: Callable[[Path], Any], precision: str
) -> None:
    assert_loads(lambda model: model.load_state_dict(load(path)), weights(), precision)
    assert_loads(lambda model: model.load_state_dict(load(path), assign=True), weights(), precision)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_every_tensor_of_a_state_dict_is_deferred(path: Path, runtime: Runtime, load: Callable[[Path], Any]) -> None:
    with runtime.init_module(empty_init=True):
        assert all(record_of(tensor) is not None for tensor in load(path).values())


def test_a_state_dict_inside_of_a_checkpoint_is_bound_with_what_is_beside_it(path: Path, runtime: Runtime) -> None:
    state = build().state_dict()
    torch.save({"epoch": 3, "names": ["a", ("b", 2)], "model": state, "dtype": torch.bfloat16}, path)
    with runtime.init_module(empty_init=True):
        found = torch.load(path)
        model = build()
        model.load_state_dict(found["model"])
    assert (found["epoch"], found["names"], found["dtype"]) == (3, ["a", ("b", 2)], torch.bfloat16)
    assert type(found["model"]) is OrderedDict
    assert found["model"]._metadata == state._metadata  # type: ignore[attr-defined]
    assert early(model) == []
    assert all(torch.equal(value, state[name]) for name, value in runtime.setup(model).state_dict().items())


def test_ties_views_strides_and_parameters_are_those_of_the_file(path: Path, runtime: Runtime) -> None:
    table = torch.randn(5, 4)
    saved = {
        "table": nn.Parameter(table),
        "same": table,
        "rows": table[1:3],
        "turned": table.t(),
        "grows": torch.randn(3, requires_grad=True),
        "none": torch.empty(0, 2),
    }
    saved["twice"] = saved["rows"]
    torch.save(saved, path)
    holder = nn.Module()
    with runtime.init_module(empty_init=True):
        found = torch.load(path)
        assert found["twice"] is found["rows"]
        assert isinstance(found["table"], nn.Parameter)
        assert found["grows"].requires_grad
        found["rows"].fill_(7)
        for name, value in found.items():
            (setattr if isinstance(value, nn.Parameter) else nn.Module.register_buffer)(holder, name, value)
    made = runtime.setup(holder).module
    table[1:3] = 7
    assert all(torch.equal(getattr(made, name), value) for name, value in saved.items())
    assert all(getattr(made, name).stride() == value.stride() for name, value in saved.items())
    assert len({getattr(made, name).untyped_storage().data_ptr() for name in ("table", "same", "rows", "turned")}) == 1


def test_an_optimizers_state_and_loose_tensors_are_real_at_once(path: Path, runtime: Runtime) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "mean": torch.arange(4.0)}, path)
    with runtime.init_module(empty_init=True):
        found = torch.load(path)
        new = build()
        new.load_state_dict(found["model"])
    assert early(new) == []
    assert torch.equal(found["mean"] + 1, torch.arange(4.0) + 1)
    made, again = runtime.setup(new, torch.optim.AdamW(new.parameters()))
    again.load_state_dict(found["optimizer"])
    for each, step in ((model, optimizer.step), (made, again.step)):
        each.zero_grad()
        loss = each(torch.ones(2, 6)).sum()
        loss.backward() if each is model else runtime.backward(loss)
        step()
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in model.state_dict().items())


class Unknown:
    def __init__(self) -> None:
        self.table = torch.arange(3.0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_what_torch_has_to_load_itself_is_as_without_us(path: Path, runtime: Runtime) -> None:
    legacy, script, objects, sparse = (path.with_name(name) for name in ("legacy", "script", "objects", "sparse"))
    torch.save(weights(), legacy, _use_new_zipfile_serialization=False)
    torch.save({"args": argparse.Namespace(lr=1), "model": weights()}, objects)
    torch.save({"w": torch.eye(3).to_sparse()}, sparse)
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), script)
    with runtime.init_module(empty_init=True), path.open("rb") as opened:
        real = [
            torch.load(legacy)["0.weight"],
            torch.load(opened)["0.weight"],
            torch.load(path, map_location=lambda storage, location: storage)["0.weight"],
            torch.load(path, map_location={"cpu": "cpu"})["0.weight"],
            torch.load(path, pickle_module=pickle, weights_only=False)["0.weight"],
            torch.load(objects, weights_only=False)["model"]["0.weight"],
        ]
        assert torch.load(sparse)["w"].is_sparse
        assert torch.load(path, map_location="meta")["0.weight"].device.type == "meta"
        with pytest.warns(UserWarning, match="TorchScript"):
            assert isinstance(torch.load(script, weights_only=False), torch.jit.ScriptModule)
    assert all(record_of(tensor) is None and torch.equal(tensor, weights()["0.weight"]) for tensor in real)


def test_torchs_refusals_stay_and_name_the_file(path: Path, runtime: Runtime) -> None:
    objects, short = path.with_name("objects.pt"), path.with_name("short.pt")
    torch.save({"model": weights(), "args": argparse.Namespace(lr=1)}, objects)
    short.write_bytes(path.read_bytes()[:-60])
    with runtime.init_module(empty_init=True):
        with pytest.raises(pickle.UnpicklingError, match="weights_only") as refused:
            torch.load(objects)
        with pytest.raises(RuntimeError, match="central directory") as damaged:
            torch.load(short)
        with pytest.raises(FileNotFoundError, match="absent"):
            torch.load(path.with_name("absent"))
    assert any(str(objects) in note for note in refused.value.__notes__)
    assert any(str(short) in note for note in damaged.value.__notes__)


def test_a_file_that_is_written_before_setup_is_an_error_that_names_it(path: Path, runtime: Runtime) -> None:
    with runtime.init_module(empty_init=True):
        model = build()
        model.load_state_dict(torch.load(path))
    write_in_place(path)
    with pytest.raises(CheckpointError, match=r"(?s)model.pt was written to.*weight"):
        runtime.setup(model)


def test_nothing_changes_where_nothing_is_deferred(path: Path, runtime: Runtime) -> None:
    plain = torch.load
    with runtime.init_module(empty_init=True):
        assert torch.load is not plain
        with runtime.init_module(empty_init=False):
            inside = torch.load(path)["0.weight"]
    assert record_of(inside) is None
    assert torch.equal(inside, weights()["0.weight"])
    with pytest.raises(ZeroDivisionError), runtime.init_module(empty_init=True):
        raise ZeroDivisionError
    assert torch.load is torch.serialization.load is plain
