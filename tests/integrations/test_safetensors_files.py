"""safetensors inside `init_module`: whatever way a library reads a file, deferred tensors are bound to it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

from nucleate import Integration, Runtime
from nucleate.deferred import record_of
from nucleate.errors import CheckpointError
from nucleate.integrations.safetensors_files import SafetensorsFiles
from nucleate.testing import IntegrationSuite
from tests.device import cpu_only
from tests.integrations.weights import PRECISIONS, assert_loads, build, weights, write_in_place

pytestmark = cpu_only("what a library loads for the CPU is bound to its file where the CPU is recorded for")


class TestSafetensorsFiles(IntegrationSuite):
    loads = True

    def make_integration(self) -> Integration:
        return SafetensorsFiles()

    def construct(self) -> nn.Module:
        return build()

    def store(self, model: nn.Module, folder: Path) -> None:
        save_file(model.state_dict(), folder / "model.safetensors")

    def load(self, folder: Path) -> nn.Module:
        model = build()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model


class Opened(Mapping[str, Tensor]):
    """A file that is opened for reading, as a mapping."""

    def __init__(self, path: Path) -> None:
        self.file: Any = safe_open(path, "pt")

    def __getitem__(self, key: str) -> Tensor:
        return self.file.get_tensor(key)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.keys())

    def __len__(self) -> int:
        return len(self.file.keys())

    def copy(self) -> dict[str, Tensor]:
        return dict(self)


def halves(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is not a dict
        return {
            key: torch.cat([part[: part.get_shape()[0] // 2], part[part.get_shape()[0] // 2 :]])
            for key, part in parts.items()
        }


def one_by_one(model: nn.Module, path: Path) -> None:
    with safe_open(path, "pt") as file:
        for name in [name for name, _ in model.named_parameters()]:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, nn.Parameter(file.get_tensor(name)))


LOADS: dict[str, Callable[[nn.Module, Path], object]] = {
    "load_file": lambda model, path: model.load_state_dict(load_file(path)),
    "load_file, assigned": lambda model, path: model.load_state_dict(load_file(path, "cpu"), assign=True),
    "load_model": load_model,
    "by attribute": lambda model, path: model.load_state_dict(safetensors.torch.load_file(str(path), device="cpu")),
    "torch.load": lambda model, path: model.load_state_dict(torch.load(path)),
    "mapping": lambda model, path: model.load_state_dict(Opened(path)),
    "slices": lambda model, path: model.load_state_dict(halves(path)),
    "one by one": one_by_one,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(weights(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_all_parameters_stay_deferred_and_get_the_files_values(
    path: Path, load: Callable[[nn.Module, Path], object], precision: str
) -> None:
    assert_loads(lambda model: load(model, path), weights(), precision)


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(accelerator="cpu", strategy="single_device")


def test_every_tensor_that_is_read_is_deferred(path: Path, runtime: Runtime) -> None:
    with runtime.init_module(empty_init=True):
        for found in (load_file(path), dict(Opened(path)), halves(path), torch.load(path)):
            assert found.keys() == weights().keys()
            assert all(record_of(tensor) is not None for tensor in found.values())


def test_a_slice_is_that_of_the_library_and_has_memory_of_its_own(path: Path, runtime: Runtime) -> None:
    holder = nn.Module()
    with safe_open(path, "pt") as file:
        plain = file.get_slice("0.weight")
        expected = [plain[2:5], plain[:, 1:3], plain[3], plain[...]]
        dtype, shape = plain.get_dtype(), plain.get_shape()
    with runtime.init_module(empty_init=True), safe_open(path, "pt") as file:
        found = file.get_slice("0.weight")
        assert (found.get_dtype(), found.get_shape()) == (dtype, shape)
        parts = [found[2:5], found[:, 1:3], found[3], found[...]]
        assert [part.shape for part in parts] == [part.shape for part in expected]
        assert [part.untyped_storage().nbytes() for part in parts] == [4 * part.numel() for part in expected]
        parts[3].zero_()
        for index, part in enumerate(parts):
            holder.register_buffer(f"part{index}", part)
    made = list(runtime.setup(holder).buffers())
    assert all(torch.equal(one, other) for one, other in zip(made[:3], expected[:3], strict=True))
    assert made[3].count_nonzero() == 0


def test_tensors_without_elements_and_of_all_dtypes_are_bound(tmp_path: Path, runtime: Runtime) -> None:
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool)
    tensors = {str(dtype).removeprefix("torch."): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "all.safetensors")
    holder = nn.Module()
    with runtime.init_module(empty_init=True):
        for name, tensor in load_file(tmp_path / "all.safetensors").items():
            holder.register_buffer(f"a_{name}", tensor)
    found = {name.removeprefix("a_"): tensor for name, tensor in runtime.setup(holder).named_buffers()}
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: t.dtype for name, t in tensors.items()}
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in tensors.items())


def test_nothing_changes_where_nothing_is_deferred(path: Path, runtime: Runtime) -> None:
    inside: list[Tensor] = []
    with runtime.init_module(empty_init=True):
        with runtime.init_module(empty_init=False):
            inside.append(load_file(path)["0.weight"])
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        with safe_open(path, "numpy") as file:
            assert type(file.get_tensor("0.weight")).__name__ == "ndarray"
    with runtime.init_module(empty_init=False):
        inside.append(load_file(path)["0.weight"])
    inside.append(load_file(path)["0.weight"])
    assert all(record_of(tensor) is None and torch.equal(tensor, weights()["0.weight"]) for tensor in inside)


def test_a_thread_that_does_not_construct_reads_as_ever(path: Path, runtime: Runtime) -> None:
    found: list[Tensor] = []
    go, done = threading.Event(), threading.Event()

    def read() -> None:
        go.wait(60)
        with safe_open(path, "pt") as file:
            found.append(file.get_tensor("0.weight"))
        found.append(load_file(path)["0.weight"])
        done.set()

    # Started outside: what the block starts works for the constructor.
    thread = threading.Thread(target=read)
    thread.start()
    with runtime.init_module(empty_init=True):
        go.set()
        assert done.wait(60)
    thread.join()
    assert all(type(tensor) is Tensor and torch.equal(tensor, weights()["0.weight"]) for tensor in found)


def test_errors_are_the_librarys_and_name_the_file(tmp_path: Path, path: Path, runtime: Runtime) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes()[:40])
    with runtime.init_module(empty_init=True):
        with pytest.raises(SafetensorError) as caught:
            load_file(damaged)
        assert any(str(damaged) in note for note in caught.value.__notes__)
        with pytest.raises(FileNotFoundError, match="absent.safetensors"):
            load_file(tmp_path / "absent.safetensors")
        with safe_open(path, "pt") as file, pytest.raises(SafetensorError, match="does not contain tensor nothing"):
            file.get_tensor("nothing")
        with pytest.raises(SafetensorError, match="closed"):
            file.get_tensor("0.weight")


@pytest.mark.parametrize("device", ["xla", "nonsense"])
@pytest.mark.parametrize("load", [load_file, lambda path, device: torch.load(path, map_location=device)])
def test_another_device_is_the_librarys_own_matter(
    path: Path, runtime: Runtime, load: Callable[[Path, str], object], device: str
) -> None:
    torch.save(weights(), path.with_name("model.pt"))
    for each in (path, path.with_name("model.pt")) if load is not load_file else (path,):
        with pytest.raises(Exception) as outside:  # noqa: PT011 - whichever it is
            load(each, device)
        with runtime.init_module(empty_init=True), pytest.raises(outside.type) as inside:
            load(each, device)
        assert str(inside.value) == str(outside.value)


def test_a_file_that_is_written_before_setup_is_an_error_that_names_it(path: Path, runtime: Runtime) -> None:
    with runtime.init_module(empty_init=True):
        model = build()
        model.load_state_dict(load_file(path))
    write_in_place(path)
    with pytest.raises(CheckpointError, match=r"(?s)model.safetensors was written to.*weight"):
        runtime.setup(model)


def test_a_file_that_is_replaced_before_setup_never_gives_the_new_values(path: Path, runtime: Runtime) -> None:
    with runtime.init_module(empty_init=True):
        model = build()
        model.load_state_dict(load_file(path))
    save_file({name: torch.zeros_like(value) for name, value in weights().items()}, path.with_name("other"))
    os.replace(path.with_name("other"), path)
    found = runtime.setup(model).state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights().items())


def test_the_class_is_the_librarys_again_after_an_error(path: Path, runtime: Runtime) -> None:
    before = dict(vars(safe_open))
    with suppress(ZeroDivisionError), runtime.init_module(empty_init=True):
        load_file(path)
        assert vars(safe_open)["get_tensor"] is not before["get_tensor"]
        raise ZeroDivisionError
    assert dict(vars(safe_open)) == before
    assert safetensors.torch.safe_open is safe_open
