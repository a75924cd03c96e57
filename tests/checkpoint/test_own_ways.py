"""Modules that load in their own way are loaded before `setup`: what their code does is recorded on the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.checkpoint.stored import data_file
from nucleate.deferred import record_of
from nucleate.errors import CheckpointError, CheckpointKeyError, ShapeMismatchError
from tests.device import ACCELERATOR, equal

pytestmark = pytest.mark.usefixtures("factories_on_device")

HEADS, SIZE, WIDTH = 4, 8, 32


class Attention(nn.Module):
    """Older versions had three projections, interleaved halves, a transposed output, and a buffer as a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("scale", torch.randn(WIDTH))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for kind in ("weight", "bias"):
            if f"{prefix}q.{kind}" in state:
                q, k, v = (state.pop(f"{prefix}{name}.{kind}") for name in "qkv")
                q, k = (part.unflatten(0, (HEADS, SIZE // 2, 2)).transpose(1, 2).flatten(0, 2) for part in (q, k))
                state[f"{prefix}qkv.{kind}"] = torch.cat((q, k, v))
        if f"{prefix}proj" in state:
            proj = state.pop(f"{prefix}proj")
            state[f"{prefix}out.weight"], state[f"{prefix}scale"] = proj[:, :WIDTH].t().contiguous(), proj[:, WIDTH]
        super()._load_from_state_dict(state, prefix, *args)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Attention() for _ in "ab")
        self.head = nn.Linear(WIDTH, 16, bias=False)
        self.head.weight = self.embed.weight
        self.head.register_load_state_dict_pre_hook(self.renamed)

    @staticmethod
    def renamed(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}old" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}old")


def old(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(5)
    stored = {"head.old": torch.randn(16, WIDTH)}
    for block in range(2):
        for name in "qkv":
            stored[f"blocks.{block}.{name}.weight"] = torch.randn(WIDTH, WIDTH)
            stored[f"blocks.{block}.{name}.bias"] = torch.randn(WIDTH)
        stored[f"blocks.{block}.proj"] = torch.randn(WIDTH, WIDTH + 1)
    return {name: tensor.to(dtype) for name, tensor in stored.items()}


def eager(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    model = Model()
    model.load_state_dict({**stored, "embed.weight": stored["head.old"]})
    return model.state_dict()


def same(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[k], expected[k].to(state[k])) for k in expected)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("when", ["before setup", "real", "after setup"])
def test_old_names_and_layouts_are_read_as_the_modules_code_has_it(
    tmp_path: Path, when: str, precision: str, suffix: str
) -> None:
    path, stored = tmp_path / f"m.{suffix}", old()
    save_file(stored, path) if suffix == "safetensors" else torch.save(stored, path)
    runtime = Runtime(accelerator=ACCELERATOR, precision=precision)
    with runtime.init_module(empty_init=when != "real"):
        model = Model()
    if when == "after setup":
        model = runtime.setup(model)
    report = runtime.load_raw(path, model)
    assert report.is_exact
    assert {one.key for one in report.loaded} == set(Model().state_dict()) - {"head.weight", "embed.weight"} | {
        "head.weight"
    }
    assert [one.key for one in report.tied] == ["embed.weight"]
    if when != "after setup":
        model = runtime.setup(model)
    assert same(model.module, eager(stored))
    assert model.head.weight is model.embed.weight


def test_nothing_is_read_before_setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(old(), tmp_path / "m.safetensors")
    read: list[int] = []
    plain = data_file.DataFile.read_into
    monkeypatch.setattr(
        data_file.DataFile,
        "read_into",
        lambda self, at, size, offset: (read.append(size), plain(self, at, size, offset)),
    )
    runtime = Runtime(accelerator=ACCELERATOR)
    with runtime.init_module(empty_init=True):
        model = Model()
    runtime.load_raw(tmp_path / "m.safetensors", model)
    assert sum(read) == 0
    runtime.setup(model)
    size = sum(tensor.nbytes for tensor in old().values())
    # A column in the middle of rows is read with what lies between.
    assert size <= sum(read) <= 1.2 * size


@pytest.mark.parametrize("deferred", [True, False])
def test_strict_refuses_what_the_modules_code_leaves(tmp_path: Path, deferred: bool) -> None:
    runtime = Runtime(accelerator=ACCELERATOR)
    wrong: dict[str, tuple[Callable[[dict[str, Tensor]], Any], type[Exception], str]] = {
        "missing": (lambda s: s.pop("head.old"), CheckpointKeyError, r"missing in the checkpoint: .*embed\.weight"),
        "unexpected": (
            lambda s: s.update({"blocks.0.other": torch.ones(1)}),
            CheckpointKeyError,
            r"unexpected in the checkpoint: blocks\.0\.other",
        ),
        "shape": (
            lambda s: s.update({"blocks.1.proj": torch.ones(WIDTH, WIDTH)[:, :20].repeat(1, 2)[:, : WIDTH + 1]}),
            ShapeMismatchError,
            r"blocks\.0\.qkv\.bias is \(96,\) here but \(64,\) in the checkpoint",
        ),
    }
    for name, (change, error, message) in wrong.items():
        stored = old()
        change(stored)
        if name == "shape":
            stored["blocks.0.v.bias"] = torch.ones(0)
        save_file({k: v.contiguous() for k, v in stored.items()}, tmp_path / "m.safetensors")
        torch.manual_seed(1)
        with runtime.init_module(empty_init=deferred):
            model = Model()
        with pytest.raises(error, match=message):
            runtime.load_raw(tmp_path / "m.safetensors", model)
        torch.manual_seed(1)
        assert same(runtime.setup(model).module, Model().state_dict())


def test_code_that_looks_at_a_value_gets_it(tmp_path: Path) -> None:
    class Versioned(nn.Linear):
        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
            if state.pop(f"{prefix}format", torch.tensor(1)).item() == 2:
                state[f"{prefix}weight"] = state[f"{prefix}weight"].neg()
            super()._load_from_state_dict(state, prefix, *args)

    runtime = Runtime(accelerator=ACCELERATOR)
    for number in (1, 2):
        weight = torch.arange(6.0).view(3, 2)
        save_file({"weight": weight, "bias": torch.ones(3), "format": torch.tensor(number)}, tmp_path / "m.safetensors")
        with runtime.init_module(empty_init=True):
            model = Versioned(2, 3)
        runtime.load_raw(tmp_path / "m.safetensors", model)
        assert torch.equal(runtime.setup(model).weight, weight if number == 1 else -weight)


@pytest.mark.parametrize("deferred", [True, False])
def test_code_that_writes_elsewhere_is_refused_by_name(tmp_path: Path, deferred: bool) -> None:
    class Writing(nn.Linear):
        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
            with torch.no_grad():
                self.weight[:1].mul_(state[f"{prefix}weight"].sum())
            super()._load_from_state_dict(state, prefix, *args)

    save_file({"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3)}, tmp_path / "m.safetensors")
    runtime = Runtime(accelerator=ACCELERATOR)
    torch.manual_seed(1)
    with runtime.init_module(empty_init=deferred):
        model = nn.Sequential(Writing(2, 3))
    with pytest.raises(CheckpointError, match=r"Writing \(0\) writes 0\.weight by mul_ while it loads"):
        runtime.load_raw(tmp_path / "m.safetensors", model)
    torch.manual_seed(1)
    assert torch.equal(runtime.setup(model).module[0].weight, Writing(2, 3).weight)


def test_a_module_that_refuses_is_quoted(tmp_path: Path) -> None:
    class Refusing(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)
            args[-1].append("this format is too old")

    save_file({"weight": torch.ones(3, 2), "bias": torch.ones(3)}, tmp_path / "m.safetensors")
    runtime = Runtime(accelerator=ACCELERATOR)
    with runtime.init_module(empty_init=True):
        model = Refusing(2, 3)
    with pytest.raises(CheckpointError, match=r"Refusing refuses .*m\.safetensors: this format is too old"):
        runtime.load_raw(tmp_path / "m.safetensors", model)


def test_hooks_after_loading_are_recorded(tmp_path: Path) -> None:
    def normalize(module: Any, keys: Any) -> None:
        with torch.no_grad():
            module.weight.div_(module.weight.norm())

    save_file({"weight": torch.arange(6.0).view(3, 2), "bias": torch.ones(3)}, tmp_path / "m.safetensors")
    runtime = Runtime(accelerator=ACCELERATOR)
    with runtime.init_module(empty_init=True):
        model = nn.Linear(2, 3)
    model.register_load_state_dict_post_hook(normalize)
    runtime.load_raw(tmp_path / "m.safetensors", model)
    weight = torch.arange(6.0).view(3, 2)
    assert torch.equal(runtime.setup(model).weight, weight / weight.norm())


def test_a_training_state_loads_into_a_deferred_model_of_such_modules(tmp_path: Path) -> None:
    runtime = Runtime(accelerator=ACCELERATOR)
    torch.manual_seed(3)
    first = runtime.setup(Model())
    runtime.save(tmp_path / "last", {"model": first, "step": 3})
    state: dict[str, Any] = {"step": 0}
    with runtime.init_module(empty_init=True):
        state["model"] = Model()
    runtime.load(tmp_path / "last", state)
    assert state["step"] == 3
    assert same(runtime.setup(state["model"]).module, first.module.state_dict())


class Replacing(nn.Linear):
    """Its bias is a new parameter."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        self.bias = nn.Parameter(state.pop(f"{prefix}bias") * 2)
        super()._load_from_state_dict({**state, f"{prefix}bias": self.bias}, prefix, *args)


class Skipping(nn.Linear):
    """It does not load its bias."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        self.weight.data.copy_(state[f"{prefix}weight"])


class InParts(nn.Linear):
    """It writes its weight row by row, and its bias in three other ways."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        with torch.no_grad():
            for row in range(len(self.weight)):
                self.weight[row].copy_(state[f"{prefix}weight"][-1 - row])
            self.bias.zero_()
            self.bias.data = state[f"{prefix}bias"].flip(0)


class Counted(nn.Linear):
    """Its weight was stored as integers."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        state[f"{prefix}weight"] = (state[f"{prefix}weight"] * 10).to(torch.int32)
        super()._load_from_state_dict(state, prefix, *args)


class Growing(nn.Linear):
    """It has a table that is as long as what is stored, and makes one more."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.register_buffer("table", torch.zeros(1))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        self.table = torch.zeros_like(state[f"{prefix}weight"][0])
        self.register_buffer("more", state[f"{prefix}bias"] + 1, persistent=False)
        state[f"{prefix}table"] = state[f"{prefix}weight"][0]
        super()._load_from_state_dict(state, prefix, *args)


@pytest.mark.parametrize("when", ["before setup", "real", "after setup"])
@pytest.mark.parametrize("kind", [Replacing, Skipping, InParts, Counted, Growing])
def test_own_code_that_writes_in_other_ways_is_done(tmp_path: Path, kind: type[nn.Linear], when: str) -> None:
    stored = {"0.weight": torch.arange(12.0).view(4, 3) / 7, "0.bias": torch.arange(1.0, 5.0)}
    save_file(stored, tmp_path / "m.safetensors")
    torch.manual_seed(1)
    expected = nn.Sequential(kind(3, 4))
    expected.load_state_dict(stored, strict=False)
    runtime = Runtime(accelerator=ACCELERATOR)
    torch.manual_seed(1)
    with runtime.init_module(empty_init=when == "before setup"):
        model: Any = nn.Sequential(kind(3, 4))
    if when == "after setup":
        model = runtime.setup(model)
    runtime.load_raw(tmp_path / "m.safetensors", model)
    if when != "before setup":
        assert not any(record_of(tensor) is not None for tensor in (*model.parameters(), *model.buffers()))
    if when != "after setup":
        model = runtime.setup(model)
    found, wanted = dict(model.module.named_buffers()), dict(expected.named_buffers())
    found |= dict(model.module.named_parameters())
    wanted |= dict(expected.named_parameters())
    assert found.keys() == wanted.keys()
    assert all(equal(found[name], wanted[name]) for name in wanted)


def test_a_module_that_makes_modules_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    class Making(nn.Linear):
        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
            self.extra = nn.Linear(2, 2)
            self.alias = state[f"{prefix}weight"]
            super()._load_from_state_dict(state, prefix, *args)

    save_file({"weight": torch.ones(3, 2), "bias": torch.ones(3)}, tmp_path / "m.safetensors")
    model = Making(2, 3)
    before = set(vars(model)) | set(model._modules)
    with pytest.raises(CheckpointError, match=r"Making \(the model\) makes or replaces modules while it loads"):
        Runtime(accelerator=ACCELERATOR).load_raw(tmp_path / "m.safetensors", model)
    assert set(vars(model)) | set(model._modules) == before


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(3), nn.LazyBatchNorm1d])
def test_lazy_modules_get_their_shape_from_the_file(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    source = make()
    source(torch.randn(5, 4))
    with torch.no_grad():
        for tensor in source.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(3))
    save_file(source.state_dict(), tmp_path / "m.safetensors")
    model = make()
    assert Runtime(accelerator=ACCELERATOR).load_raw(tmp_path / "m.safetensors", model).is_exact
    assert same(model, dict(source.state_dict()))


@pytest.mark.parametrize("call", ["load", "load_raw"])
def test_hooks_run_once_after_loading_into_a_model_that_is_set_up(tmp_path: Path, call: str) -> None:
    seen: list[str] = []
    model = nn.Sequential(nn.Linear(2, 3))
    model.register_load_state_dict_post_hook(lambda module, keys: seen.append(type(module).__name__))
    model[0].register_load_state_dict_post_hook(lambda module, keys: seen.append(type(module).__name__))
    runtime = Runtime(accelerator=ACCELERATOR)
    wrapped = runtime.setup(model)
    if call == "load":
        runtime.save(tmp_path / "last", {"model": wrapped})
        runtime.load(tmp_path / "last", {"model": wrapped})
    else:
        save_file(model.state_dict(), tmp_path / "m.safetensors")
        runtime.load_raw(tmp_path / "m.safetensors", wrapped)
    assert seen == ["Linear", "Sequential"]
