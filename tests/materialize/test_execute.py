"""Materialization: whose memory it takes, which objects it keeps, and which attributes survive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate.deferred import RangeMaker, Record, deferred
from nucleate.errors import DeferredError, ReplayError, UninitializedError
from nucleate.materialize import Plan, execute, materialize
from nucleate.testing import peak_memory
from tests.deferred.equality import assert_same_model
from tests.device import ACCELERATOR, ON_CPU, cpu_only, device

pytestmark = pytest.mark.usefixtures("factories_on_device")

MIB = 2**20

BUILD = """
import torch
from torch import nn
from nucleate.deferred import deferred
from nucleate.materialize import materialize

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(24))
        self.apply(lambda m: nn.init.normal_(m.weight, std=0.02) if isinstance(m, nn.Linear) else None)

with deferred():
    warm = nn.Linear(4, 4)
materialize(warm)
"""


def test_the_peak_is_the_model_itself_and_recording_takes_next_to_nothing() -> None:
    # 96 MiB in all, each parameter initialized twice.
    recorded = peak_memory("with deferred():\n    model = Model()", BUILD)
    assert recorded.added_bytes < 8 * MIB
    made = peak_memory("materialize(model)", BUILD + "\nwith deferred():\n    model = Model()\n")
    assert made.added_bytes < (96 + 12) * MIB


def test_objects_ties_and_attributes_are_kept() -> None:
    with deferred(device()):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
    weight = model[0].weight
    weight.decay = "none"
    materialize(model, device())
    assert model[0].weight is weight is model[1].weight
    assert weight.decay == "none"
    assert type(weight) is nn.Parameter


def test_a_tensor_that_somebody_holds_weakly_is_replaced_where_it_is_held() -> None:
    with deferred(device()):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        model.everything = [model[0].weight, {"again": model[0].weight}]
    reference = weakref.ref(model[0].weight)
    materialize(model, device())
    assert reference() is None
    assert model[0].weight is model[1].weight is model.everything[0] is model.everything[1]["again"]
    assert not model[0].weight.is_meta


def test_materializing_again_changes_nothing() -> None:
    with deferred(device()):
        model = nn.Linear(3, 3)
    materialize(model, device())
    before = model.weight.detach().clone()
    assert materialize(model, device()) is model
    assert torch.equal(model.weight, before)


def test_a_plan_lists_every_tensor_with_all_its_names_and_sizes() -> None:
    with deferred(device()):
        model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.BatchNorm1d(20))
        model.tied = model[0].weight
    plan = Plan.of(model)
    assert plan.targets[0].fqn == "tied"
    assert plan.size_bytes == 4 * (200 + 4 * 20)
    text = str(plan)
    assert "tied = 0.weight" in text
    assert "float32" in text
    assert "(20, 10)" in text
    assert "1.running_var" in text
    assert f"{len(plan.targets)} deferred tensors" in text


def test_equal_constructions_have_equal_digests_and_others_have_not() -> None:
    def digest(seed: int, width: int = 4) -> str:
        torch.manual_seed(seed)
        with deferred(device()):
            model = nn.Linear(4, width)
            nn.init.trunc_normal_(model.weight)
        return Plan.of(model).digest()

    assert digest(0) == digest(0)
    assert digest(0) != digest(1)
    assert digest(0) != digest(0, width=5)


def test_other_constants_make_other_digests() -> None:
    def digest(value: float) -> str:
        with deferred(device()):
            layer = nn.Linear(2, 2)
            layer.weight.data.copy_(torch.from_numpy(np.full((2, 2), value)))
        return Plan.of(layer).digest()

    torch.manual_seed(0)
    first = digest(1.0)
    torch.manual_seed(0)
    assert digest(1.0) == first
    torch.manual_seed(0)
    assert digest(2.0) != first


def test_a_parameter_filled_piece_by_piece_is_planned_and_made_in_linear_time_and_memory() -> None:
    setup = (
        BUILD
        + """
from nucleate.materialize import Plan
with deferred():
    model = nn.Module()
    model.experts = nn.Parameter(torch.empty(2000, 64, 64))
    for index in range(2000):
        model.experts.data[index].normal_()
"""
    )
    assert peak_memory("plan = Plan.of(model)", setup).added_bytes < 8 * MIB
    assert peak_memory("materialize(model)", setup).added_bytes < (2000 * 64 * 64 * 4) + 12 * MIB


def test_a_step_that_does_something_else_when_replayed_is_an_error() -> None:
    with deferred(device()) as record:
        model = nn.Module()
        model.weight = nn.Parameter(torch.randn(4) + 1)
    step = record.tape.steps[-1]
    step.func = lambda *args, **kwargs: torch.zeros(5)
    with pytest.raises(ReplayError, match=r"\(5,\).*recorded as torch.float32 of shape \(4,\)"):
        materialize(model, device())


def test_what_is_left_without_a_value_is_an_error_by_name() -> None:
    with deferred(device()):
        model = nn.Linear(3, 3)
    plan = Plan.of(model)
    plan.release()
    plan.groups.pop()
    with pytest.raises(UninitializedError, match=r"(weight|bias) have no value"):
        execute(plan, model, device())


def construct_apart(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    eager = make()
    torch.manual_seed(0)
    with deferred(device()):
        model = make()
    return eager, model


def test_what_an_interrupted_materialization_did_not_reach_is_still_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> nn.Module:
        model = nn.Module()
        model.first = nn.Parameter(nn.init.orthogonal_(torch.empty(9, 9)))
        model.second = nn.Parameter(nn.init.orthogonal_(torch.empty(9, 9)))
        model.third = nn.Linear(5, 5)
        return model

    eager, model = construct_apart(make)
    real = Record.make
    calls: list[int] = []

    def make_one(self: Record, storage: int, *args: Any) -> torch.UntypedStorage:
        calls.append(storage)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, storage, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Record, "make", make_one)
        with pytest.raises(KeyboardInterrupt):
            materialize(model, device())
    assert torch.equal(model.first, eager.first)
    with pytest.raises(DeferredError, match="second"):
        model.second.data.add_(1)
    materialize(model, device())
    assert_same_model(eager, model)


def test_shards_that_were_interrupted_are_without_memory_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="fsdp")
    with runtime.init_module():
        model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    # What the CPU makes in ranges a device makes whole.
    owner: Any = RangeMaker if ON_CPU else Record
    real = owner.make
    calls: list[int] = []

    def make_one(self: Any, place: int, *args: Any) -> Any:
        calls.append(place)
        if len(calls) == 2:
            raise MemoryError("no more")
        return real(self, place, *args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, "make", make_one)
        with pytest.raises(MemoryError, match="no more"):
            runtime.setup(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(UninitializedError, match="weight"):
        materialize(model, device())


@cpu_only("it is about the CPU's index")
def test_the_cpu_with_an_index_is_the_cpu() -> None:
    torch.manual_seed(0)
    expected = nn.Linear(4, 4)
    torch.manual_seed(0)
    model = nn.ModuleList()
    with deferred("cpu:0"):
        model.extend([nn.Linear(4, 4), nn.Module()])
        model[1].rows = nn.Parameter(model[0].weight.data[1:])
    index = torch.device("cpu", 0)
    # In two plans: the second one shares the memory that the first one made.
    for part in (model[0], model):
        plan = Plan.of(part)
        plan.check_device(index)
        plan.release()
        execute(plan, part, index)
    assert model[0].weight.device == model[1].rows.device == torch.device("cpu")
    assert torch.equal(model[0].weight, expected.weight)
    assert model[1].rows.data_ptr() == model[0].weight[1].data_ptr()
