"""`load_raw`: the weights of others into a model that is deferred, real or set up."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.checkpoint import LoadReport, raw_loader
from nucleate.checkpoint.stored import data_file
from nucleate.errors import (
    CheckpointError,
    CheckpointKeyError,
    CheckpointNotFoundError,
    DeferredEditError,
    ShapeMismatchError,
    UsageError,
)
from tests.device import ACCELERATOR, cpu_only

pytestmark = pytest.mark.usefixtures("factories_on_device")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.body = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Linear(24, 16))
        self.head = nn.Linear(16, 40, bias=False)
        self.register_buffer("table", torch.arange(5.0), persistent=False)


class Tied(Model):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


def make(seed: int, kind: type[nn.Module] = Model) -> nn.Module:
    torch.manual_seed(seed)
    return kind()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(accelerator=ACCELERATOR, strategy="single_device")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(weights(make(1)), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def deferred(runtime: Runtime, load: Callable[[nn.Module], Any], seed: int = 2, kind: type[nn.Module] = Model) -> Any:
    torch.manual_seed(seed)
    with runtime.init_module(empty_init=True):
        model = kind()
    load(model)
    return runtime.setup(model)


def real(runtime: Runtime, load: Callable[[nn.Module], Any], seed: int = 2, kind: type[nn.Module] = Model) -> Any:
    model = make(seed, kind)
    load(model)
    return runtime.setup(model)


def afterwards(runtime: Runtime, load: Callable[[nn.Module], Any], seed: int = 2, kind: type[nn.Module] = Model) -> Any:
    model = runtime.setup(make(seed, kind))
    load(model)
    return model


WAYS = [deferred, real, afterwards]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("way", WAYS)
def test_every_tensor_comes_from_the_file(runtime: Runtime, path: Path, way: Any) -> None:
    reports: list[LoadReport] = []
    model = way(runtime, lambda model: reports.append(runtime.load_raw(path, model)))
    assert same(model.state_dict(), weights(make(1)))
    assert torch.equal(model.table, torch.arange(5.0))
    assert reports[0].is_exact
    assert len(reports[0].loaded) == len(model.state_dict())
    assert sum(one.size_bytes for one in reports[0].loaded) == sum(t.nbytes for t in model.state_dict().values())


def test_a_deferred_model_reads_nothing_before_setup(
    runtime: Runtime, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = data_file.DataFile.read_into

    def counted(self: data_file.DataFile, address: int, size_bytes: int, offset: int) -> None:
        read.append(size_bytes)
        plain(self, address, size_bytes, offset)

    monkeypatch.setattr(data_file.DataFile, "read_into", counted)
    with runtime.init_module(empty_init=True):
        model = Model()
    runtime.load_raw(path, model)
    # The counter of the batch norm: `torch.tensor(0)` is real in a constructor, too.
    assert sum(read) == 8
    runtime.setup(model)
    assert sum(read) == sum(tensor.nbytes for tensor in make(1).state_dict().values())


def save_unfitting(path: Path) -> None:
    """Save a checkpoint that lacks a tensor, has one too many, and one of another shape."""
    stored = weights(make(1))
    del stored["body.0.bias"]
    save_file({**stored, "extra": torch.zeros(3), "head.weight": torch.zeros(41, 16)}, path)


@pytest.mark.parametrize("way", WAYS)
def test_strict_refuses_missing_unexpected_and_mismatched_before_anything_changes(
    runtime: Runtime, tmp_path: Path, way: Any
) -> None:
    save_unfitting(tmp_path / "m.safetensors")
    errors: list[CheckpointError] = []

    def refused(model: nn.Module) -> None:
        with pytest.raises(CheckpointKeyError) as error:
            runtime.load_raw(tmp_path / "m.safetensors", model)
        errors.append(error.value)

    model = way(runtime, refused)
    assert same(model.state_dict(), weights(make(2)))
    message = str(errors[0])
    assert "1 missing in the checkpoint: body.0.bias" in message
    assert "1 unexpected in the checkpoint: extra" in message
    assert "head.weight is (40, 16) here but (41, 16) in the checkpoint" in message
    assert "m.safetensors" in message
    assert "strict=False" in message


@pytest.mark.parametrize("way", WAYS)
def test_not_strict_takes_what_fits_and_leaves_the_rest_to_its_recipe(
    runtime: Runtime, tmp_path: Path, way: Any
) -> None:
    save_unfitting(tmp_path / "m.safetensors")
    reports: list[LoadReport] = []

    def load(model: nn.Module) -> None:
        with pytest.warns(UserWarning, match=r"not in it: body\.0\.bias; not fitting: head\.weight"):
            reports.append(runtime.load_raw(tmp_path / "m.safetensors", model, strict=False))

    model = way(runtime, load)
    fresh, loaded = weights(make(2)), weights(make(1))
    expected = {**loaded, "body.0.bias": fresh["body.0.bias"], "head.weight": fresh["head.weight"]}
    assert same(model.state_dict(), expected)
    report = reports[0]
    assert [one.key for one in report.missing] == ["body.0.bias"]
    assert [one.key for one in report.unexpected] == ["extra"]
    assert [one.key for one in report.mismatched] == ["head.weight"]
    assert report.missing[0].size_bytes == 24 * 4
    assert report.unexpected[0].size_bytes == 12
    assert "missing" in str(report)
    assert "96 B" in str(report)


def test_a_wrong_shape_alone_is_a_shape_error(runtime: Runtime, tmp_path: Path) -> None:
    save_file({**weights(make(1)), "head.weight": torch.zeros(16, 40)}, tmp_path / "m.safetensors")
    with pytest.raises(ShapeMismatchError, match=r"head\.weight is \(40, 16\) here but \(16, 40\)"):
        runtime.load_raw(tmp_path / "m.safetensors", make(2))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_floating_dtypes_are_cast_and_reported(
    runtime: Runtime, tmp_path: Path, way: Any, dtype: torch.dtype
) -> None:
    stored = {n: t.to(dtype) if t.is_floating_point() else t for n, t in weights(make(1)).items()}
    save_file(stored, tmp_path / "m.safetensors")
    reports: list[LoadReport] = []
    model = way(runtime, lambda model: reports.append(runtime.load_raw(tmp_path / "m.safetensors", model)))
    assert same(model.state_dict(), {n: t.to(model.state_dict()[n].dtype) for n, t in stored.items()})
    assert len(reports[0].cast) == sum(t.is_floating_point() for t in stored.values())
    assert reports[0].cast[0].detail == f"{dtype} -> torch.float32"


def test_the_precision_casts_what_was_read(tmp_path: Path) -> None:
    save_file(weights(make(1)), tmp_path / "m.safetensors")
    runtime = Runtime(accelerator=ACCELERATOR, precision="bf16-true", strategy="single_device")
    with runtime.init_module(empty_init=True):
        model = Model()
    runtime.load_raw(tmp_path / "m.safetensors", model)
    wrapped = runtime.setup(model)
    assert torch.equal(wrapped.head.weight, make(1).head.weight.bfloat16())


def test_integers_are_not_taken_for_floats(runtime: Runtime, tmp_path: Path) -> None:
    save_file({**weights(make(1)), "body.0.bias": torch.zeros(24, dtype=torch.int32)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"body\.0\.bias is torch\.float32 here but torch\.int32"):
        runtime.load_raw(tmp_path / "m.safetensors", make(2))


def test_nan_and_infinity_are_kept_bit_for_bit(runtime: Runtime, tmp_path: Path) -> None:
    words = torch.tensor([0x7FC12345, -0x3FEDC, 0x7F800000, -0x800000, 1, -0x80000000], dtype=torch.int32)
    save_file({"weight": words.view(torch.float32).view(2, 3)}, tmp_path / "m.safetensors")
    with runtime.init_module(empty_init=True):
        model = nn.Linear(3, 2, bias=False)
    runtime.load_raw(tmp_path / "m.safetensors", model)
    model = runtime.setup(model)
    assert torch.equal(model.weight.detach().view(torch.int32).view(-1), words)


@pytest.mark.parametrize("way", WAYS)
def test_a_tie_is_loaded_once_under_either_name(runtime: Runtime, tmp_path: Path, way: Any) -> None:
    for name in ("embed.weight", "head.weight"):
        stored = weights(make(1, Tied))
        del stored["embed.weight" if name == "head.weight" else "head.weight"]
        save_file(stored, tmp_path / "m.safetensors")
        reports: list[LoadReport] = []
        load = lambda model, reports=reports: reports.append(runtime.load_raw(tmp_path / "m.safetensors", model))  # noqa: E731
        model = way(runtime, load, kind=Tied)
        assert model.embed.weight is model.head.weight
        assert torch.equal(model.embed.weight, make(1, Tied).embed.weight)
        assert [one.detail for one in reports[0].tied] == [f"= {name}"]


def test_a_tie_that_the_file_holds_twice_must_be_one(runtime: Runtime, tmp_path: Path) -> None:
    stored = weights(make(1, Tied))
    save_file({**stored, "head.weight": stored["head.weight"].clone()}, tmp_path / "m.safetensors")
    model = make(2, Tied)
    runtime.load_raw(tmp_path / "m.safetensors", model)
    assert torch.equal(model.embed.weight, stored["embed.weight"])
    save_file({**stored, "head.weight": stored["head.weight"] + 1}, tmp_path / "n.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.weight is tied to embed\.weight here but not in the checkpoint"):
        runtime.load_raw(tmp_path / "n.safetensors", model)


def test_prefixes_and_key_maps_name_the_keys_anew(runtime: Runtime, tmp_path: Path) -> None:
    stored = {f"net.{name.replace('body', 'trunk')}": tensor for name, tensor in weights(make(1)).items()}
    save_file({**stored, "other.weight": torch.zeros(2)}, tmp_path / "m.safetensors")
    model = make(2)
    report = runtime.load_raw(tmp_path / "m.safetensors", model, prefix="net.", keys={r"^trunk\.": "body."})
    assert report.is_exact
    assert same(weights(model), weights(make(1)))


@pytest.mark.parametrize(
    "prefix", ["model.", "module.", "_orig_mod.", "model._orig_mod.", "net.inner.", "_forward_module."]
)
@pytest.mark.parametrize("empty_init", [True, False])
def test_a_prefix_that_all_keys_have_is_found(runtime: Runtime, tmp_path: Path, prefix: str, empty_init: bool) -> None:
    stored = {f"{prefix}{name}": tensor for name, tensor in weights(make(1)).items()}
    save_file(stored, tmp_path / "m.safetensors")
    torch.save({"state_dict": stored, "epoch": 3}, tmp_path / "m.ckpt")
    for path in (tmp_path / "m.safetensors", tmp_path / "m.ckpt"):
        with runtime.init_module(empty_init=empty_init):
            model = make(2)
        report = runtime.load_raw(path, model)
        assert report.is_exact
        assert same(weights(runtime.setup(model)), weights(make(1)))


def test_the_report_names_the_prefix_that_was_found(runtime: Runtime, tmp_path: Path) -> None:
    torch.save({"state_dict": {f"net.{n}": t for n, t in weights(make(1)).items()}}, tmp_path / "m.ckpt")
    report = runtime.load_raw(tmp_path / "m.ckpt", make(2))
    assert report.prefix == "state_dict.net."
    assert "the keys without 'state_dict.net.'" in str(report)


def test_a_prefix_that_only_some_keys_have_is_suggested(runtime: Runtime, tmp_path: Path) -> None:
    beside = {"other.weight": torch.zeros(2)}
    save_file({**{f"net.{n}": t for n, t in weights(make(1)).items()}, **beside}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointKeyError, match=r"all of them are there behind 'net\.'\. Pass prefix='net\.'"):
        runtime.load_raw(tmp_path / "m.safetensors", make(2))
    with pytest.raises(CheckpointNotFoundError, match=r"no key of .* begins with 'nett\.'; there are 12: net\."):
        runtime.load_raw(tmp_path / "m.safetensors", make(2), prefix="nett.")


def test_the_hooks_by_which_a_module_takes_old_names_are_asked(runtime: Runtime, tmp_path: Path) -> None:
    def make_normed(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))

    stored = weights(make_normed(1))
    old = {
        "weight_g": stored["parametrizations.weight.original0"],
        "weight_v": stored["parametrizations.weight.original1"],
        "bias": stored["bias"],
    }
    save_file(old, tmp_path / "m.safetensors")
    model = make_normed(2)
    assert runtime.load_raw(tmp_path / "m.safetensors", model).is_exact
    assert same(weights(model), stored)


@pytest.mark.parametrize("deferred", [True, False])
def test_a_hook_may_compute_with_values(runtime: Runtime, path: Path, deferred: bool) -> None:
    with runtime.init_module(empty_init=deferred):
        model = Model()

    def double(module: nn.Module, state: dict[str, Tensor], *args: Any) -> None:
        state["head.weight"] = state["head.weight"] * 2

    model.register_load_state_dict_pre_hook(double)
    assert runtime.load_raw(path, model).is_exact
    expected = weights(make(1))
    assert torch.equal(runtime.setup(model).head.weight, 2 * expected["head.weight"])


@cpu_only("a device cannot use the memory of a mapped file")
def test_mapped_weights_lie_in_the_file_and_the_file_is_never_changed(runtime: Runtime, path: Path) -> None:
    before = path.read_bytes()
    with runtime.init_module(empty_init=True):
        model = Model()
    runtime.load_raw(path, model, mmap=True)
    model = runtime.setup(model)
    assert same(model.state_dict(), weights(make(1)))
    maps = Path("/proc/self/maps").read_text()
    starts = [int(line.split("-")[0], 16) for line in maps.splitlines() if line.endswith(str(path))]
    ends = [int(line.split("-")[1].split()[0], 16) for line in maps.splitlines() if line.endswith(str(path))]
    address = model.head.weight.data_ptr()
    assert any(start <= address < end for start, end in zip(starts, ends, strict=True))
    with torch.no_grad():
        model.head.weight.add_(1)
    assert path.read_bytes() == before
    assert torch.equal(model.head.weight, make(1).head.weight + 1)


def test_a_file_that_is_cut_short_after_binding_is_an_error_and_the_model_can_be_set_up_again(
    runtime: Runtime, path: Path
) -> None:
    whole, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    with runtime.init_module(empty_init=True):
        model = Model()
    runtime.load_raw(path, model)
    with path.open("r+b") as file:
        file.truncate(len(whole) // 2)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends at byte .* cut short after it was opened"):
        runtime.setup(model)
    path.write_bytes(whole)
    os.utime(path, ns=times)  # the same file, put back with its times
    assert same(runtime.setup(model).state_dict(), weights(make(1)))


def test_a_file_that_is_written_to_after_binding_is_an_error_by_name(runtime: Runtime, path: Path) -> None:
    with runtime.init_module(empty_init=True):
        model = Model()
    runtime.load_raw(path, model)
    save_file(weights(make(5)), path.with_suffix(".new"))
    with path.open("r+b") as file:  # as `cp` does it
        file.write(path.with_suffix(".new").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors was written to .*embed\.weight"):
        runtime.setup(model)


def test_a_file_that_is_replaced_after_binding_is_read_as_it_was(runtime: Runtime, path: Path, tmp_path: Path) -> None:
    with runtime.init_module(empty_init=True):
        model = Model()
    runtime.load_raw(path, model)
    save_file(weights(make(5)), tmp_path / "new")
    (tmp_path / "new").rename(path)
    assert same(runtime.setup(model).state_dict(), weights(make(1)))


def test_nothing_there_and_nothing_to_load_into(runtime: Runtime, tmp_path: Path, path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="nothing has that name"):
        runtime.load_raw(tmp_path / "absent", make(1))
    with pytest.raises(
        UsageError, match=r"load_raw takes a path and then a torch\.nn\.Module or an optimizer, not dict"
    ):
        runtime.load_raw(path, {"model": make(1)})  # type: ignore[arg-type]


def test_a_model_built_on_meta_by_hand_is_bound_to_the_file(runtime: Runtime, path: Path) -> None:
    with torch.device("meta"):
        model = Model()
    # No file has it, and no method of the model.
    model.table = torch.arange(5.0)
    state = torch.get_rng_state()
    report = runtime.load_raw(path, model)
    assert not report.missing
    assert torch.equal(torch.get_rng_state(), state)
    assert same(runtime.setup(model).state_dict(), weights(make(1)))


def test_a_folder_with_an_index_is_one_checkpoint(runtime: Runtime, tmp_path: Path) -> None:
    stored = weights(make(1))
    names = list(stored)
    weight_map = {}
    for number, part in enumerate((names[:3], names[3:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: stored[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model = make(2)
    runtime.load_raw(tmp_path, model)
    assert same(weights(model), stored)


def test_mapped_parameters_that_share_bytes_in_the_file_are_not_tied_by_it(runtime: Runtime, tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    torch.save({"0.weight": weight, "1.weight": weight, "2.weight": weight[:32]}, tmp_path / "m.pt")
    with runtime.init_module(empty_init=True):
        model = nn.Sequential(*(nn.Linear(64, rows, bias=False) for rows in (64, 64, 32)))
    runtime.load_raw(tmp_path / "m.pt", model, mmap=True)
    model = runtime.setup(model)
    with torch.no_grad():
        model.module[0].weight.zero_()
    assert torch.equal(model.module[1].weight, weight)
    assert torch.equal(model.module[2].weight, weight[:32])


def test_a_copy_of_a_mapped_parameter_has_memory_of_its_own(runtime: Runtime, path: Path) -> None:
    with runtime.init_module(empty_init=True):
        model = Model()
        other = nn.Linear(16, 40, bias=False)
        runtime.load_raw(path, model, mmap=True)
        other.weight = nn.Parameter(model.head.weight.clone())
    twin = copy.deepcopy(model)
    for each in (runtime.setup(model), runtime.setup(twin), runtime.setup(other)):
        expected = make(1).head.weight
        weight = each.module.head.weight if hasattr(each.module, "head") else each.module.weight
        assert torch.equal(weight, expected)
        with torch.no_grad():
            weight.zero_()


def test_a_file_that_is_cut_short_behind_its_header_is_an_error_before_anything_has_changed(
    runtime: Runtime, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = raw_loader.plan_module

    def cut(*args: Any) -> dict[str, str]:
        os.truncate(path, path.stat().st_size - 8)
        return plain(*args)

    monkeypatch.setattr(raw_loader, "plan_module", cut)
    model = runtime.setup(make(2))
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends at byte .* cut short after it was opened"):
        runtime.load_raw(path, model)
    assert same(model.state_dict(), weights(make(2)))


def test_an_edit_that_nothing_recorded_is_found_before_anything_is_read(tmp_path: Path) -> None:
    stored = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    save_file(stored.state_dict(), tmp_path / "model.safetensors")
    runtime = Runtime(accelerator=ACCELERATOR)
    with runtime.init_module(empty_init=True):
        deferred_part = nn.Linear(3, 3)
    alias = deferred_part.weight.detach()
    with torch._C.DisableTorchFunctionSubclass():
        alias.zero_()
    real_part = nn.Linear(3, 3)
    before = real_part.weight.detach().clone()
    with pytest.raises(DeferredEditError, match="weight was edited outside"):
        runtime.load_raw(tmp_path / "model.safetensors", nn.Sequential(real_part, deferred_part))
    assert torch.equal(real_part.weight, before)
