"""Modules that are stored in another form than they are held in: filled from either, deferred or real, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.checkpoint import StoredForm, StoredSources
from nucleate.deferred import ConvertedSource, ElementSource, convert, record_of
from nucleate.errors import CheckpointError, CheckpointKeyError
from nucleate.precision import NoCastPrecision
from tests.deferred.rows import Rows
from tests.device import ACCELERATOR

pytestmark = pytest.mark.usefixtures("factories_on_device")


class Quantized(nn.Module, StoredForm):
    """Holds codes and scales; stores `weight` and `weight.scales`, and the number of its rows, computed."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        codes, scales = convert(weight, Rows())
        self.codes, self.scales = nn.Parameter(codes, requires_grad=False), nn.Parameter(scales, requires_grad=False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.codes if keep_vars else self.codes.detach()
        destination[f"{prefix}weight.scales"] = self.scales if keep_vars else self.scales.detach()
        is_deferred = record_of(self.scales) is not None
        destination[f"{prefix}weight.sum"] = torch.zeros(()) if is_deferred else self.scales.detach().sum()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        assert torch.equal(state_dict[f"{prefix}weight.sum"], self.scales.sum())

    def bind_stored(self, stored: Mapping[str, ElementSource]) -> StoredSources:
        if "weight.scales" in stored:
            given = {"codes": stored["weight"], "scales": stored["weight.scales"]}
            return StoredSources(given, frozenset(("weight", "weight.scales", "weight.sum")))
        if "weight" not in stored:
            return StoredSources({}, frozenset(), ("weight",))
        weight = stored["weight"]
        if tuple(weight.shape) != tuple(self.codes.shape):
            raise CheckpointError(f"weight is {tuple(self.codes.shape)} here but {weight.shape} in the checkpoint")
        return StoredSources(
            {n: ConvertedSource(weight, Rows(), i) for i, n in enumerate(("codes", "scales"))}, frozenset(stored)
        )


def model(*, deferred: bool) -> tuple[Runtime, nn.Module]:
    runtime = Runtime(accelerator=ACCELERATOR)
    with runtime.init_module(empty_init=deferred):
        made = nn.ModuleDict({"first": Quantized(nn.Linear(6, 4).weight), "norm": nn.LayerNorm(4)})
    return runtime, made


def parts(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}


def assert_equal(module: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, tensor in module.named_parameters():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("when", ["deferred", "real", "set up"])
@pytest.mark.parametrize("form", ["quantized", "full"])
def test_a_module_is_filled_from_either_form(tmp_path: Path, when: str, form: str) -> None:
    _, source = model(deferred=False)
    weight = torch.randn(4, 6)
    source["first"] = Quantized(weight)
    stored: dict[str, Tensor] = {name: t.contiguous() for name, t in source.state_dict().items()}
    if form == "full":
        stored = {name: t for name, t in stored.items() if not name.startswith("first.")} | {"first.weight": weight}
    save_file(stored, tmp_path / "a.safetensors")
    runtime, target = model(deferred=when == "deferred")
    if when == "set up":
        target = runtime.setup(target)
    report = runtime.load_raw(tmp_path / "a.safetensors", target)
    assert report.is_exact
    assert {finding.key for finding in report.loaded} == {"first.codes", "first.scales", "norm.weight", "norm.bias"}
    if when == "deferred":
        target = runtime.setup(target)
    assert_equal(target, parts(source))


@pytest.mark.parametrize("deferred", [True, False])
def test_what_save_wrote_is_loaded_again(tmp_path: Path, deferred: bool) -> None:
    runtime, source = model(deferred=False)
    runtime.save(tmp_path / "folder", {"model": source, "step": 3})
    runtime, target = model(deferred=deferred)
    state = {"model": target, "step": 0}
    assert runtime.load(tmp_path / "folder", state).is_exact
    assert state["step"] == 3
    if deferred:
        target = runtime.setup(target)
    assert_equal(target, parts(source))


@pytest.mark.parametrize("deferred", [True, False])
def test_what_it_cannot_take_is_refused_by_name_and_nothing_changes(tmp_path: Path, deferred: bool) -> None:
    save_file(
        {"first.weight": torch.ones(4, 7), "norm.weight": torch.ones(4), "norm.bias": torch.ones(4)},
        tmp_path / "a.safetensors",
    )
    runtime, target = model(deferred=deferred)
    before = None if deferred else parts(target)
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"first: weight is \(4, 6\) here but \(4, 7\)"):
            runtime.load_raw(tmp_path / "a.safetensors", target, strict)
    if before is not None:
        assert_equal(target, before)


def test_what_is_missing_and_what_nobody_takes_is_told(tmp_path: Path) -> None:
    save_file(
        {"norm.weight": torch.ones(4), "norm.bias": torch.ones(4), "first.other": torch.ones(2)},
        tmp_path / "a.safetensors",
    )
    runtime, target = model(deferred=True)
    with pytest.raises(CheckpointKeyError) as refused:
        runtime.load_raw(tmp_path / "a.safetensors", target)
    assert "missing in the checkpoint: first.weight" in str(refused.value)
    assert "unexpected in the checkpoint: first.other" in str(refused.value)
    with pytest.warns(UserWarning, match=r"first\.weight"):
        report = runtime.load_raw(tmp_path / "a.safetensors", target, strict=False)
    assert [finding.key for finding in report.missing] == ["first.weight"]
    runtime.setup(target)


def test_the_precision_sees_what_is_stored_before_it_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, source = model(deferred=False)
    save_file(dict(source.state_dict()), tmp_path / "a.safetensors")
    runtime = Runtime(accelerator=ACCELERATOR)
    with runtime.init_module(empty_init=True):
        target = nn.ModuleDict({"first": nn.Linear(6, 4, bias=False), "norm": nn.LayerNorm(4)})

    def before_load(self: NoCastPrecision, module: nn.Module, stored: Mapping[str, ElementSource]) -> None:
        assert stored["first.weight"].shape == (4, 6)
        module["first"] = Quantized(module["first"].weight)

    monkeypatch.setattr(NoCastPrecision, "before_load", before_load)
    assert runtime.load_raw(tmp_path / "a.safetensors", target).is_exact
    monkeypatch.setattr(NoCastPrecision, "setup", lambda self, module: module)
    target = runtime.setup(target)
    assert_equal(target, parts(source))
    # What is set up keeps its form.
    monkeypatch.setattr(NoCastPrecision, "before_load", lambda *_: pytest.fail("it was asked again"))
    runtime.load_raw(tmp_path / "a.safetensors", target)


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("form", ["quantized", "full", "under one name"])
def test_a_module_that_stands_in_two_places_is_filled_once(tmp_path: Path, deferred: bool, form: str) -> None:
    weight = torch.randn(4, 6)
    source = Quantized(weight)
    full = {"weight": weight}
    stored = {name: t.clone() for name, t in (full if form == "full" else source.state_dict()).items()}
    prefixes = ["second"] if form == "under one name" else ["first", "second"]
    save_file({f"{p}.{n}": t.clone() for p in prefixes for n, t in stored.items()}, tmp_path / "a.safetensors")
    runtime = Runtime(accelerator=ACCELERATOR)
    with runtime.init_module(empty_init=deferred):
        part = Quantized(nn.Linear(6, 4).weight)
        target = nn.ModuleDict({"first": part, "second": part})
    assert runtime.load_raw(tmp_path / "a.safetensors", target).is_exact
    if deferred:
        runtime.setup(target)
    assert target["first"] is target["second"]
    assert_equal(target["first"], parts(source))


def test_a_module_in_two_places_takes_no_two_weights(tmp_path: Path) -> None:
    save_file({"first.weight": torch.ones(4, 6), "second.weight": torch.zeros(4, 6)}, tmp_path / "a.safetensors")
    part = Quantized(torch.randn(4, 6))
    with pytest.raises(CheckpointError, match=r"second\.weight is tied to first\.weight here but not"):
        Runtime(accelerator=ACCELERATOR).load_raw(
            tmp_path / "a.safetensors", nn.ModuleDict({"first": part, "second": part})
        )


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("kept", ["first", "second"])
def test_a_tensor_tied_to_one_of_another_module_may_be_stored_once(tmp_path: Path, deferred: bool, kept: str) -> None:
    class WithBias(Quantized):
        def __init__(self) -> None:
            super().__init__(torch.ones(4, 6))
            self.bias = nn.Parameter(torch.randn(4))

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

        def bind_stored(self, stored: Mapping[str, ElementSource]) -> StoredSources:
            bias = {"bias": stored["bias"]} if "bias" in stored else {}
            taken = super().bind_stored({name: given for name, given in stored.items() if name != "bias"})
            return StoredSources({**taken.given, **bias}, taken.used | bias.keys(), () if bias else ("bias",))

    stored = {"first.weight": torch.ones(4, 6), f"{kept}.bias": torch.arange(4.0)}
    save_file(stored, tmp_path / "a.safetensors")
    runtime = Runtime(accelerator=ACCELERATOR)
    with runtime.init_module(empty_init=deferred):
        target = nn.ModuleDict({"first": WithBias(), "second": nn.Module()})
        target["second"].bias = target["first"].bias
    assert runtime.load_raw(tmp_path / "a.safetensors", target).is_exact
    if deferred:
        runtime.setup(target)
    assert target["second"].bias is target["first"].bias
    assert target["first"].bias.tolist() == [0, 1, 2, 3]
