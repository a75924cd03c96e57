"""Verification finds what differs from its recipe, whoever made the mistake, and passes what is right."""

from __future__ import annotations

import gc
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.deferred import handle_of
from nucleate.deferred.randomness import mersenne_twister
from nucleate.deferred.randomness.stream_cursors import StreamCursors
from nucleate.errors import ConfigurationError, VerificationError
from nucleate.materialize import Plan, materialize, verification
from nucleate.materialize.reference import Reference
from nucleate.strategies.base import Strategy
from tests.device import ACCELERATOR, ON_CPU, cpu_only
from tests.zoo import ZOO

pytestmark = pytest.mark.usefixtures("factories_on_device")


class Meddler(Strategy):
    """Sets up on one device, and then changes something."""

    name = "meddler"

    def __init__(self, change: Any) -> None:
        self.change = change

    def module_init_context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def setup(self, model: nn.Module) -> nn.Module:
        materialize(model, self.device)
        with torch.no_grad():
            self.change(model)
        return model


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(20, 20) for _ in range(6))
        self.layers[4].weight = self.layers[0].weight
        nn.init.orthogonal_(self.layers[2].weight)
        self.register_buffer("table", torch.linspace(0, 1, 7).exp())
        self.plain = [torch.rand(3), torch.randn(20)]


def flip(tensor: Tensor, place: int) -> None:
    """Change the lowest bit of one element."""
    tensor.detach().view(-1).view(torch.int32)[place] ^= 1


def set_up(make: Any, verify: Any = True, **arguments: Any) -> nn.Module:
    runtime = Runtime(accelerator=ACCELERATOR, verify=verify, **{"strategy": "single_device", **arguments})
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        model = make()
    runtime.setup(model)
    return model


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("strategy", ["single_device", "ddp", "fsdp"])
def test_healthy_models_pass_and_the_stream_stays_eagers(name: str, strategy: str) -> None:
    make = ZOO[name][0]
    torch.manual_seed(0)
    make()
    expected = torch.rand(3)
    for verify in (True, "all"):
        set_up(make, verify, strategy=strategy)
        assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-mixed"])
def test_values_are_looked_at_in_the_precision_they_end_up_in(precision: str) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(20, 20, dtype=torch.float32))

    set_up(Cast, "all", precision=precision)
    with pytest.raises(VerificationError, match=r"weight on rank 0 .*element \(0, 3\)"):
        set_up(Cast, precision=precision, strategy=Meddler(lambda model: model.weight[0, 3].add_(1)))


def test_a_real_model_passes() -> None:
    for verify in (True, "all"):
        Runtime(accelerator=ACCELERATOR, verify=verify).setup(nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: flip(m.layers[1].weight, 47),
            r"layers\.1\.weight on rank 0 .*element \(2, 7\) is -?0\.\d+ but should",
        ),
        (lambda m: flip(m.layers[0].weight, 399), r"layers\.0\.weight .*element \(19, 19\)"),
        (lambda m: flip(m.layers[2].weight, 0), r"layers\.2\.weight"),
        (lambda m: flip(m.layers[5].bias, 3), r"layers\.5\.bias .*element \(3,\)"),
        (lambda m: flip(m.table, 6), r"table"),
        (lambda m: flip(m.plain[1], 19), r"plain .*element \(19,\)"),
        (lambda m: m.layers[1].weight.zero_(), r"layers\.1\.weight"),
        (
            lambda m: setattr(m.layers[1].weight, "data", m.layers[1].weight.double()),
            r"float64.* recorded as .*float32",
        ),
        (lambda m: m.layers[1].register_parameter("weight", None), r"layers\.1\.weight is no longer there"),
        (lambda m: m.layers.pop(5), r"layers\.5.* no longer"),
    ],
)
def test_a_change_to_anything_is_found_and_named(change: Any, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        set_up(Model, "all", strategy=Meddler(change))
    # So small a model is within a sample.
    with pytest.raises(VerificationError, match=message):
        set_up(Model, True, strategy=Meddler(change))
    set_up(Model, False, strategy=Meddler(change))


def test_a_module_that_a_strategy_replaces_is_looked_at_in_its_place() -> None:
    class Other(nn.Linear):
        pass

    def replace(model: nn.Module, scale: float) -> None:
        new = Other(20, 20)
        new.weight.copy_(model.layers[1].weight * scale)
        new.bias.copy_(model.layers[1].bias)
        model.layers[1] = new

    set_up(Model, strategy=Meddler(lambda model: replace(model, 1)))
    with pytest.raises(VerificationError, match=r"layers\.1\.weight"):
        set_up(Model, strategy=Meddler(lambda model: replace(model, 2)))


@cpu_only("the Mersenne Twister is the CPU's generator")
def test_a_jump_that_is_off_by_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    jump = mersenne_twister.jump
    assert mersenne_twister.jumps_as_it_draws()
    monkeypatch.setattr(mersenne_twister, "JUMP_COST", 1000)
    monkeypatch.setattr(mersenne_twister, "jump", lambda state, count, *rest: jump(state, count + 1, *rest))
    for verify in (True, "all"):
        with pytest.raises(VerificationError, match=r"layers\.\d\.(weight|bias) on rank 0"):
            set_up(_far_apart, verify)
    set_up(_far_apart, False)


def _far_apart() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(40, 40) for _ in range(5))
    # What is initialized again is passed over.
    for layer in model.layers:
        nn.init.normal_(layer.weight)
    return model


@cpu_only(
    "a device with a generator of its own makes a tensor whole, not in ranges, so it needs no place in the stream"
)
def test_a_place_in_the_stream_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    seek = StreamCursors.seek

    def elsewhere(self: StreamCursors, position: Any, offset: int, count: int) -> torch.Generator:
        return seek(self, position, offset + 16, count)

    monkeypatch.setattr(StreamCursors, "seek", elsewhere)
    with pytest.raises(VerificationError):
        set_up(ZOO["everything"][0])


def test_a_sample_has_every_kind_and_keeps_to_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(40, 40) for _ in range(50))
            self.embedding = nn.Embedding(40, 40, padding_idx=0)
            self.tied = nn.Parameter(torch.rand(30))
            self.same = self.tied
            self.square = nn.Parameter(nn.init.orthogonal_(torch.empty(8, 8)))
            self.huge = nn.Parameter(torch.rand(5000, 16))

    made: list[int] = []
    make = Reference.make

    def counted(self: Reference, recipe: Any, device: torch.device) -> torch.UntypedStorage:
        storage = make(self, recipe, device)
        made.append(storage.nbytes() // 4)
        return storage

    runtime = Runtime(accelerator=ACCELERATOR, verify=True)
    with runtime.init_module(empty_init=True):
        model = Long()
    plan = Plan.of(model)
    monkeypatch.setattr(verification, "SAMPLE_NUMEL", 20_000)
    names = [group.targets[0].fqn for group, whole in verification._sample(plan) if whole]
    monkeypatch.setattr(Reference, "make", counted)
    runtime.setup(model)
    assert {"embedding.weight", "tied", "square", "layers.0.weight", "layers.0.bias", "layers.49.weight"} <= set(names)
    assert "huge" not in names
    # A device makes whole what the CPU makes in windows.
    assert 0 < sum(made) <= 20_000 + (0 if ON_CPU else model.huge.numel())


@pytest.mark.parametrize("place", [0, 41_111, 79_999])
def test_of_what_is_too_large_for_a_sample_windows_are_looked_at(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Parameter(torch.rand(7))
            self.weight = nn.Parameter(torch.empty(5000, 16))
            nn.init.normal_(self.weight, std=0.02)

    monkeypatch.setattr(verification, "SAMPLE_NUMEL", 20_000)
    monkeypatch.setattr(verification, "WINDOW_NUMEL", 4000)
    for strategy in ("single_device", "fsdp"):
        set_up(Large, strategy=strategy)
    with pytest.raises(VerificationError, match=rf"weight .*element \({place // 16}, {place % 16}\)"):
        set_up(Large, strategy=Meddler(lambda model: flip(model.weight, place)))


def test_the_record_is_let_go_afterwards() -> None:
    runtime = Runtime(accelerator=ACCELERATOR, verify=True)
    with runtime.init_module(empty_init=True):
        model = Model()
    handle = handle_of(model.table)
    assert handle is not None
    record = weakref.ref(handle.record)
    del handle
    runtime.setup(model)
    gc.collect()
    assert record() is None


@pytest.mark.parametrize("verify", [1, 0, "some", None, "True"])
def test_the_flag_is_false_true_or_all(verify: Any) -> None:
    with pytest.raises(ConfigurationError, match="verify=.* must be False, True"):
        Runtime(accelerator=ACCELERATOR, verify=verify)
