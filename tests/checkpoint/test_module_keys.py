"""What a module asks of a checkpoint: hooks in and out, extra state, values under several names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from nucleate import Runtime
from nucleate.checkpoint import load, save
from nucleate.cluster import Communicator
from nucleate.errors import CheckpointError, CheckpointKeyError
from tests.device import ACCELERATOR, device, equal

pytestmark = pytest.mark.usefixtures("factories_on_device")


def body(seed: int, wraps: bool) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    if wraps:
        model[1] = checkpoint_wrapper(model[1])
    return model


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("here", [True, False])
def test_activation_checkpointing_does_not_show_in_the_keys(
    tmp_path: Path, solo: Communicator, saved: bool, here: bool
) -> None:
    save(tmp_path / "c", {"model": body(1, saved)}, solo)
    model = body(2, here)
    assert load(tmp_path / "c", {"model": model}, solo).is_exact
    assert same(model, body(1, False))
    save_file({n: t.clone() for n, t in body(1, saved).state_dict().items()}, tmp_path / "m.safetensors")
    raw = body(3, here)
    assert Runtime(accelerator=ACCELERATOR).load_raw(tmp_path / "m.safetensors", raw).is_exact
    assert same(raw, body(1, False))


class Extra(nn.Linear):
    """A module with state of its own that is no tensor."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.note = "fresh"

    def get_extra_state(self) -> dict[str, str]:
        return {"note": self.note}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("name", ["c", "c.safetensors", "c.pt"])
def test_extra_state_comes_back_into_deferred_and_real_modules(tmp_path: Path, deferred: bool, name: str) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device")
    saved = Extra()
    saved.note = "kept"
    runtime.save(tmp_path / name, {"model": nn.Sequential(saved)})
    with runtime.init_module(empty_init=deferred):
        model = nn.Sequential(Extra())
    assert runtime.load(tmp_path / name, {"model": model}).is_exact
    wrapped = runtime.setup(model)
    assert wrapped.module[0].note == "kept"
    assert torch.equal(wrapped.module[0].weight, saved.weight)


def test_a_buffer_that_only_the_checkpoint_has_is_unexpected(tmp_path: Path, solo: Communicator) -> None:
    save(tmp_path / "c", {"model": nn.BatchNorm1d(3)}, solo)
    with pytest.raises(CheckpointKeyError, match=r"3 unexpected in the checkpoint: model\.running_mean"):
        load(tmp_path / "c", {"model": nn.BatchNorm1d(3, track_running_stats=False)}, solo)


def test_weights_of_others_are_pointed_to_load_raw(tmp_path: Path, solo: Communicator) -> None:
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointKeyError, match="`load_raw` loads the weights of others"):
        load(tmp_path / "m.safetensors", {"model": nn.Linear(2, 2)}, solo)


def make(width: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"embed": nn.Embedding(6, 4), "body": nn.Linear(4, width), "head": nn.Linear(4, 6, bias=False)}
    )
    model["head"].weight = model["embed"].weight
    return model


def stored_as(tmp_path: Path, runtime: Runtime) -> dict[str, Path]:
    model = make(3)
    model["extra"] = nn.Linear(1, 1)
    tensors: dict[str, Tensor] = {n: t.clone() for n, t in model.state_dict().items() if n != "head.weight"}
    save_file(tensors, tmp_path / "others.safetensors")
    torch.save(tensors, tmp_path / "others.pt")
    for name in ("folder", "one.safetensors", "one.pt"):
        runtime.save(tmp_path / name, model)
    runtime.save(tmp_path / "shards", model, format="safetensors")
    return {path.name: path for path in tmp_path.iterdir()}


def test_every_format_gives_the_same_report(tmp_path: Path) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device")
    reports = {}
    for name, path in stored_as(tmp_path, runtime).items():
        model = make(2).to(torch.float64)
        model["new"] = nn.Linear(1, 1)
        with pytest.warns(UserWarning, match="not in it"):
            report = runtime.load_raw(path, model, strict=False)
        fields = ("loaded", "missing", "unexpected", "mismatched", "cast", "tied")
        reports[name] = {field: sorted(map(repr, getattr(report, field))) for field in fields}
    assert len(reports) == 6
    first = reports["folder"]
    assert all(first.values())
    assert [name for name, report in reports.items() if report != first] == []


class Holding(nn.Module):
    """Extra state that is a tensor, or a dict with one in it."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.nested = nested
        self.scale = torch.zeros(2)

    def get_extra_state(self) -> Any:
        return {"scale": self.scale.clone(), "version": 2} if self.nested else self.scale.clone()

    def set_extra_state(self, state: Any) -> None:
        self.scale = state["scale"] if self.nested else state


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("writer", ["torch", "c", "c.pt"])
def test_extra_state_with_tensors_is_handed_back(tmp_path: Path, nested: bool, deferred: bool, writer: str) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device")
    saved = nn.Sequential(Holding(nested))
    saved[0].scale = torch.ones(2)
    path = tmp_path / ("t.pt" if writer == "torch" else writer)
    if writer == "torch":
        torch.save(saved.state_dict(), path)
    else:
        runtime.save(path, saved)
    with runtime.init_module(empty_init=deferred):
        model = nn.Sequential(Holding(nested))
    assert runtime.load_raw(path, model).is_exact
    assert equal(runtime.setup(model).module[0].scale, torch.ones(2))


class Copying(nn.Linear):
    """Its state dict holds copies."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight.detach().clone()
        destination[prefix + "bias"] = self.bias


class Doubling(nn.Linear):
    """What it loads is doubled."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, *args)


class Counting(nn.Linear):
    """It is told when it was loaded."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.calls = 0
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "calls", module.calls + 1))


@pytest.mark.parametrize("kind", [Copying, Doubling, Counting])
def test_what_a_module_does_with_what_it_loads_is_done(tmp_path: Path, kind: type[nn.Linear]) -> None:
    stored = {"weight": torch.full((2, 2), 3.0), "bias": torch.ones(2)}
    save_file(stored, tmp_path / "m.safetensors")
    expected, model = kind(2, 2), kind(2, 2)
    expected.load_state_dict(stored)
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device")
    runtime.load_raw(tmp_path / "m.safetensors", model)
    assert torch.equal(model.weight, expected.weight)
    assert torch.equal(model.bias, expected.bias)
    assert getattr(model, "calls", 1) == 1
    with runtime.init_module(empty_init=True):
        deferred = kind(2, 2)
    assert runtime.load_raw(tmp_path / "m.safetensors", deferred).is_exact
    made = runtime.setup(deferred).module
    assert torch.equal(made.weight, expected.weight)
    assert torch.equal(made.bias, expected.bias)
    assert getattr(made, "calls", 1) == 1


@pytest.mark.parametrize("name", ["c", "c.safetensors", "c.pt"])
def test_a_default_device_does_not_matter(tmp_path: Path, name: str) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device")
    model = nn.Linear(300, 200)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    other = nn.Linear(300, 200, dtype=torch.bfloat16)
    resumed = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    with torch.device("meta"):  # as somebody's `set_default_device("cuda")`
        runtime.save(tmp_path / name, {"model": model, "optimizer": optimizer})
        runtime.load(tmp_path / name, {"model": other, "optimizer": resumed})
        rest = runtime.load(tmp_path / name)
    assert torch.equal(other.weight, model.weight.bfloat16())
    assert equal(rest["model"]["weight"], model.weight)
    assert resumed.state[other.weight]["momentum_buffer"].device == device()


class Renamed(nn.Module):
    """Its first version called its weight `gain`; files from before that are refused."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.gain = nn.Parameter(torch.zeros(3))
        self._register_load_state_dict_pre_hook(self._rename)

    def _rename(self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if prefix + "ancient" in state:
            rest[-1].append("it was saved by an ancient version")
        if metadata.get("version", 1) < 2:
            state[prefix + "weight"] = state.pop(prefix + "gain")
            state[prefix + "gain"] = state.pop(prefix + "offset")


def test_hooks_see_the_version_that_the_file_was_saved_by(tmp_path: Path) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device")
    saved = nn.Sequential(Renamed())
    nn.init.ones_(saved[0].weight)
    torch.save(saved.state_dict(), tmp_path / "new.pt")
    torch.save({"model": saved.state_dict()}, tmp_path / "inside.pt")
    save_file({"0.gain": torch.ones(3), "0.offset": torch.zeros(3)}, tmp_path / "old.safetensors")
    runtime.save(tmp_path / "own", saved)
    for path, prefix in (("new.pt", ""), ("inside.pt", "model."), ("old.safetensors", ""), ("own", "")):
        model = nn.Sequential(Renamed())
        assert runtime.load_raw(tmp_path / path, model, prefix=prefix).is_exact
        assert torch.equal(model[0].weight, torch.ones(3)), path
        assert torch.equal(model[0].gain, torch.zeros(3)), path


def test_a_hook_may_refuse_a_file(tmp_path: Path) -> None:
    save_file({"gain": torch.ones(3), "offset": torch.ones(3), "ancient": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"Renamed refuses .*m\.safetensors: it was saved by an ancient version"):
        Runtime(accelerator=ACCELERATOR).load_raw(tmp_path / "m.safetensors", Renamed())


@pytest.mark.parametrize("deferred", [True, False])
def test_old_batch_norms_lack_a_counter_and_new_ones_do_not(tmp_path: Path, deferred: bool) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device")
    state = nn.Sequential(nn.BatchNorm1d(3)).state_dict()
    state["0.running_mean"].fill_(2)
    new = {name: tensor for name, tensor in state.items() if "tracked" not in name}
    torch.save(dict(new), tmp_path / "old.pt")
    with runtime.init_module(empty_init=deferred):
        model = nn.Sequential(nn.BatchNorm1d(3))
    assert runtime.load_raw(tmp_path / "old.pt", model).is_exact
    model = runtime.setup(model)
    assert model.module[0].num_batches_tracked.item() == 0
    assert torch.equal(model.module[0].running_mean, torch.full((3,), 2.0))
    del state["0.num_batches_tracked"]
    torch.save(state, tmp_path / "damaged.pt")
    with pytest.raises(CheckpointKeyError, match=r"missing in the checkpoint: 0\.num_batches_tracked"):
        runtime.load_raw(tmp_path / "damaged.pt", nn.Sequential(nn.BatchNorm1d(3)))
