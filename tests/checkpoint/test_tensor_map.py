"""`load_raw(keys=)` with rules: what is read, when, into which models, and what is refused before anything changes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.checkpoint import (
    Selection,
    concatenate,
    convert,
    drop,
    inverse,
    permute_heads,
    rename,
    split,
    stack,
    transpose,
    verify,
)
from nucleate.checkpoint.loading import load_plan as plans
from nucleate.checkpoint.stored import data_file
from nucleate.errors import CheckpointError, CheckpointKeyError, ConfigurationError, ShapeMismatchError
from tests.device import ACCELERATOR, ON_CPU

pytestmark = pytest.mark.usefixtures("factories_on_device")


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(32, 64), "up": nn.Linear(32, 48)}) for _ in range(3)
        )
        self.experts = nn.Parameter(torch.randn(4, 8, 16))
        self.head = nn.Linear(32, 40, bias=False)


RULES = [
    {r"^model\.": ""},
    concatenate([f"h.{{i}}.{part}.{{kind}}" for part in "qkv"], "layers.{i}.qkv.{kind}", sizes=[2, 1, 1], groups=2),
    rename("h.{i}.mlp.{kind}", "layers.{i}.up.{kind}"),
    transpose("layers.*.up.weight"),
    stack("experts.{e}.w", "experts", dim=0),
    drop("*.inv_freq", optional=True),
]


def stored() -> dict[str, Tensor]:
    torch.manual_seed(5)
    found: dict[str, Tensor] = {"model.head.weight": torch.randn(40, 32)}
    for i in range(3):
        for part, rows in (("q", 32), ("k", 16), ("v", 16)):
            found[f"model.h.{i}.{part}.weight"] = torch.randn(rows, 32)
            found[f"model.h.{i}.{part}.bias"] = torch.randn(rows)
        found[f"model.h.{i}.mlp.weight"] = torch.randn(32, 48)
        found[f"model.h.{i}.mlp.bias"] = torch.randn(48)
    for e in range(4):
        found[f"model.experts.{e}.w"] = torch.randn(8, 16)
    return found


def expected(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {"head.weight": tensors["model.head.weight"]}
    found["experts"] = torch.stack([tensors[f"model.experts.{e}.w"] for e in range(4)])
    for i in range(3):
        for kind in ("weight", "bias"):
            parts = [tensors[f"model.h.{i}.{part}.{kind}"].chunk(2) for part in "qkv"]
            found[f"layers.{i}.qkv.{kind}"] = torch.cat([part[group] for group in range(2) for part in parts])
        found[f"layers.{i}.up.weight"] = tensors[f"model.h.{i}.mlp.weight"].t()
        found[f"layers.{i}.up.bias"] = tensors[f"model.h.{i}.mlp.bias"]
    return found


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(accelerator=ACCELERATOR, strategy="single_device")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(stored(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def assert_loaded(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    wanted = expected(stored())
    state = model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name].to(dtype)) for name in wanted)


def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    real = data_file.DataFile.read_into

    def read_into(self: Any, address: int, size_bytes: int, offset: int) -> None:
        sizes.append(size_bytes)
        real(self, address, size_bytes, offset)

    monkeypatch.setattr(data_file.DataFile, "read_into", read_into)
    return sizes


@pytest.mark.parametrize("mmap", [False, True])
def test_a_deferred_model_reads_at_setup_every_byte_once(
    runtime: Runtime, path: Path, mmap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = read_bytes(monkeypatch)
    with runtime.init_module(empty_init=True):
        model = Fused()
    report = runtime.load_raw(path, model, keys=RULES, mmap=mmap)
    assert sum(sizes) == 0
    assert report.is_exact
    assert len(report.loaded) == len(expected(stored()))
    runtime.setup(model)
    assert_loaded(model)
    everything = sum(tensor.numel() * 4 for tensor in stored().values())
    # What is only renamed may lie in the file's pages, if it stays on the CPU.
    assert sum(sizes) == everything if not (mmap and ON_CPU) else everything * 0.5 < sum(sizes) < everything


@pytest.mark.parametrize("is_set_up", [False, True])
def test_a_real_model_is_filled(runtime: Runtime, path: Path, is_set_up: bool) -> None:
    model = Fused()
    target = runtime.setup(model) if is_set_up else model
    assert runtime.load_raw(path, target, keys=RULES).is_exact
    assert_loaded(model)


def test_values_are_cast_to_the_models_dtype(path: Path) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device", precision="bf16-true")
    with runtime.init_module(empty_init=True):
        model = Fused()
    runtime.load_raw(path, model, keys=RULES)
    runtime.setup(model)
    assert_loaded(model, torch.bfloat16)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.float16, torch.float64]
)
def test_rules_read_nothing_of_any_dtype(
    runtime: Runtime, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {name: torch.randint(0, 2, (8, 6)).to(dtype) for name in "abc"}
    save_file(tensors, tmp_path / "m.safetensors")
    sizes = read_bytes(monkeypatch)
    with runtime.init_module(empty_init=True):
        model = nn.Module()
        for name, shape in (("joined", (6, 16)), ("heads", (4, 6)), ("rest", (4, 6))):
            model.register_buffer(name, torch.zeros(shape, dtype=dtype))
    rules = [
        concatenate(["a", "b"], "joined", groups=2),
        transpose("joined"),
        permute_heads("c", num_heads=2),
        split("c", ["heads", "rest"], groups=2),
    ]
    assert runtime.load_raw(tmp_path / "m.safetensors", model, keys=rules).is_exact
    assert sum(sizes) == 0
    runtime.setup(model)
    a, b, c = tensors["a"], tensors["b"], tensors["c"]
    assert torch.equal(model.joined, torch.cat([a[:4], b[:4], a[4:], b[4:]]).t())
    c = c.view(2, 2, 2, 6).transpose(1, 2).reshape(8, 6)
    assert torch.equal(model.heads, torch.cat([c[:2], c[4:6]]))


def test_inside_the_block_that_constructs_it_works_too(runtime: Runtime, path: Path) -> None:
    with runtime.init_module(empty_init=True):
        model = Fused()
        runtime.load_raw(path, model, keys=RULES)
    runtime.setup(model)
    assert_loaded(model)


def test_results_that_a_module_ties_are_read_once(runtime: Runtime, tmp_path: Path) -> None:
    save_file({"w": torch.randn(6, 4)}, tmp_path / "m.safetensors")
    model = nn.ModuleDict({"a": nn.Linear(6, 4, bias=False), "b": nn.Linear(6, 4, bias=False)})
    model["b"].weight = model["a"].weight  # type: ignore[assignment]
    report = runtime.load_raw(
        tmp_path / "m.safetensors", model, keys=[transpose("w"), rename("w", "a.weight", "b.weight")]
    )
    assert [str(one) for one in report.tied] == ["b.weight (= a.weight)"]


def test_leftovers_are_named_by_the_keys_of_the_file_and_results_by_what_they_are_made_of(
    runtime: Runtime, tmp_path: Path
) -> None:
    save_file(
        {"extra": torch.ones(2), "x": torch.ones(2), "y": torch.ones(2), "weight": torch.ones(3, 2)},
        tmp_path / "m.safetensors",
    )
    model = nn.Linear(2, 4)
    with pytest.warns(UserWarning, match="not in it: bias; not fitting: weight"):
        report = runtime.load_raw(tmp_path / "m.safetensors", model, strict=False, keys=concatenate(["x", "y"], "xy"))
    assert [str(one) for one in report.unexpected] == ["extra", "xy (made of x, y)"]
    assert [one.key for one in report.missing] == ["bias"]
    assert [one.key for one in report.mismatched] == ["weight"]
    with pytest.raises(CheckpointKeyError, match=r"2 unexpected in the checkpoint: extra, xy"):
        runtime.load_raw(tmp_path / "m.safetensors", model, keys=concatenate(["x", "y"], "xy"))


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (
            rename("nothing.*", "*"),
            CheckpointKeyError,
            r"rename\('nothing.\*', '\*'\) finds nothing in .*model.safetensors",
        ),
        (
            concatenate(["model.h.{i}.q.weight", "model.h.{i}.z.weight"], "{i}"),
            CheckpointKeyError,
            r"0 lacks model.h.0.z",
        ),
        (split("model.head.weight", ["a", "b", "c"]), ShapeMismatchError, r"model.head.weight is \(40, 32\), and 40"),
        (rename("model.h.{i}.q.weight", "same"), CheckpointKeyError, "both become same"),
        (permute_heads("model.head.weight", 16), ShapeMismatchError, "is not 16 heads of pairs"),
        ([transpose("model.head.weight"), 5], ConfigurationError, "5 is not a key map"),
    ],
)
@pytest.mark.parametrize("is_deferred", [False, True])
def test_what_cannot_be_is_refused_before_anything_changes(
    runtime: Runtime, path: Path, keys: Any, error: type[Exception], message: str, is_deferred: bool
) -> None:
    torch.manual_seed(1)
    with runtime.init_module(empty_init=is_deferred):
        model = Fused()
    with pytest.raises(error, match=message):
        runtime.load_raw(path, model, keys=keys)
    runtime.setup(model)
    torch.manual_seed(1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), Fused().parameters(), strict=True))


def test_a_file_that_is_cut_short_is_an_error_before_anything_changes(runtime: Runtime, path: Path) -> None:
    model = Fused()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    real = plans.LoadPlan.check

    def cut(self: Any, strict: bool) -> None:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - 100)
        real(self, strict)

    with mock.patch.object(plans.LoadPlan, "check", cut), pytest.raises(CheckpointError):
        runtime.load_raw(path, model, keys=RULES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_rule_may_be_a_regular_expression_among_other_maps(runtime: Runtime, tmp_path: Path) -> None:
    save_file({"net.0.W": torch.ones(2, 3), "net.0.b": torch.ones(3)}, tmp_path / "m.safetensors")
    model = nn.Sequential(nn.Linear(2, 3))
    report = runtime.load_raw(
        tmp_path / "m.safetensors",
        model,
        keys=[
            transpose(re.compile(r"net\.\d+\.W")),
            lambda key: key.removeprefix("net."),
            rename(re.compile(r"(\d+)\.W"), r"\1.weight"),
            {r"b$": "bias"},
        ],
    )
    assert report.is_exact


@pytest.mark.parametrize("target", ["out.safetensors", "out.pt", "folder"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_conversion_applies_them(path: Path, tmp_path: Path, target: str, dtype: torch.dtype | None) -> None:
    report = convert(path, tmp_path / target, keys=RULES, dtype=dtype)
    assert report.num_tensors == len(expected(stored()))
    model = Fused().to(dtype or torch.float32)
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device")
    assert runtime.load_raw(tmp_path / target, model).is_exact
    assert_loaded(model, dtype or torch.float32)


def test_a_conversion_there_and_back_is_the_file_that_it_was(path: Path, tmp_path: Path) -> None:
    rules = RULES[1:-1]
    convert(path, tmp_path / "there.safetensors", selection=Selection(prefix="model.", keys=rules))
    convert(
        tmp_path / "there.safetensors",
        tmp_path / "back.safetensors",
        keys=[*inverse(rules), lambda key: f"model.{key}"],
    )  # type: ignore[arg-type]
    assert verify(tmp_path / "back.safetensors", against=path).is_good


def test_keys_are_given_once(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="given twice"):
        convert(path, tmp_path / "a.pt", keys=RULES, selection=Selection(keys=RULES))
