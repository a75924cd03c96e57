"""Which facts bits depend on: read from recipes, and true of this build of torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from nucleate.cluster.numerics import BUILD, CAPABILITY, DEVICE, FILLS, LIBRARIES, THREADS, Numerics
from nucleate.deferred import deferred
from nucleate.materialize import Plan
from nucleate.materialize.dependence import GRAIN_NUMEL, numerics_of

CPU = torch.device("cpu")


def numerics(make: Callable[[], torch.Tensor]) -> Numerics:
    torch.manual_seed(0)
    with deferred():
        model = nn.Module()
        model.weight = nn.Parameter(make())
    return numerics_of(Plan.of(model), CPU)


LARGE = GRAIN_NUMEL + 3


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: torch.zeros(20), set()),
        (lambda: torch.eye(5) * 3 + 1, set()),
        (lambda: torch.arange(20).float() / 7, set()),
        (lambda: torch.rand(20) * 0.2 - 0.1, {BUILD}),
        (lambda: torch.empty(20).uniform_(-0.25, 0.25), {BUILD}),
        (lambda: torch.rand(20, dtype=torch.float64).bfloat16(), {BUILD}),
        (lambda: torch.randperm(20).float(), {BUILD}),
        (lambda: torch.empty(20).uniform_(-0.3, 0.3), {BUILD, FILLS}),
        (lambda: nn.Linear(3, 3).weight.detach(), {BUILD, FILLS}),
        (lambda: torch.randn(20), {BUILD, FILLS}),
        (lambda: torch.empty(3).normal_(), {BUILD, FILLS}),
        (lambda: nn.init.trunc_normal_(torch.empty(5, 5), a=-0.1, b=0.1), {BUILD, FILLS}),
        (lambda: torch.add(torch.rand(20), torch.rand(20), alpha=0.3), {BUILD, CAPABILITY, LIBRARIES}),
        (lambda: torch.rand(20).exp(), {BUILD, CAPABILITY, LIBRARIES}),
        (lambda: torch.rand(20).sum(0, keepdim=True), {BUILD, CAPABILITY, LIBRARIES}),
        (lambda: torch.rand(LARGE).exp(), {BUILD, CAPABILITY, LIBRARIES, THREADS}),
        (lambda: torch.rand(LARGE).mean().expand(3).clone(), {BUILD, CAPABILITY, LIBRARIES, THREADS}),
        (lambda: torch.linspace(0, 1, LARGE + TRIAL), {BUILD, CAPABILITY, LIBRARIES, THREADS}),
        (lambda: nn.init.orthogonal_(torch.empty(5, 5)), {BUILD, FILLS, CAPABILITY, LIBRARIES, THREADS}),
        (lambda: torch.rand(5, 5) @ torch.rand(5, 5), {BUILD, CAPABILITY, LIBRARIES, THREADS}),
    ],
)
def test_a_recipe_depends_on_what_its_operations_do(make: Callable[[], torch.Tensor], expected: set[str]) -> None:
    found = numerics(make)
    assert found.examples.keys() == expected
    assert set(found.examples.values()) <= {"weight"}
    assert found.facts.keys() >= expected
    assert not found.trials


def test_what_follows_a_rejection_loop_depends_on_how_much_it_drew() -> None:
    with deferred():
        model = nn.Module()
        nn.init.trunc_normal_(torch.empty(50), a=-0.1, b=0.1)
        model.weight = nn.Parameter(torch.rand(20))
    assert numerics_of(Plan.of(model), CPU).examples.keys() == {BUILD, FILLS}


def test_small_tables_are_made_to_see() -> None:
    found = numerics(lambda: 1 / 10_000 ** (torch.arange(0, 64, 2) / 64))
    assert not found.examples
    again = numerics(lambda: 1 / 10_000 ** (torch.arange(0, 64, 2) / 64))
    other = numerics(lambda: 1 / 10_001 ** (torch.arange(0, 64, 2) / 64))
    assert found.trials.keys() == {"weight"}
    assert found.trials == again.trials != other.trials


def test_looking_leaves_the_model_deferred_and_the_stream_where_it_is() -> None:
    with deferred():
        model = parametrizations.weight_norm(nn.Linear(7, 7))
        model.table = nn.Buffer(torch.linspace(0, 1, 9).exp())
    before = torch.get_rng_state()
    numerics_of(Plan.of(model), CPU)
    assert torch.equal(before, torch.get_rng_state())
    assert "deferred" in repr(model.bias)
    assert "deferred" in repr(model.table)


def test_the_number_of_threads_that_mkl_was_given_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.__config__, "parallel_info", lambda: "OpenMP\n\tmkl_get_max_threads() : 5\n")
    assert numerics(lambda: torch.rand(3, 3) @ torch.rand(3, 3)).facts[THREADS] == "3 (MKL: 5)"


def test_on_a_gpu_random_values_depend_on_which_one_it_is() -> None:
    class Properties:
        name = "H100"
        multi_processor_count = 132

    with deferred():
        model = nn.Linear(3, 3)
    plan = Plan.of(model)
    with pytest.MonkeyPatch.context() as patch:
        # There need not be one to ask: what is read is the device that the record stands for.
        patch.setattr(plan.records[0], "device", torch.device("cuda"))
        patch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
        found = numerics_of(plan, torch.device("cuda"))
    assert found.examples.keys() == {BUILD, DEVICE}
    assert found.facts[DEVICE].startswith("H100 with 132 multiprocessors")


# -- what this build of torch does -----------------------------------------------------------------------------------

MEASURE = """
import hashlib, json, math, torch
def mark(tensor):
    return hashlib.blake2b(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
marks = {}
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for numel in (5, 100, 5003, 90_001):
        fills = {"zero": (0, 0.37), "power": (-0.5, 0.5), "linear": (-1 / math.sqrt(300), 1 / math.sqrt(300))}
        for name, bounds in fills.items():
            torch.manual_seed(0)
            marks[f"uniform {name} {dtype} {numel}"] = mark(torch.empty(numel, dtype=dtype).uniform_(*bounds))
        for name, bounds in {"plain": (0, 1), "shifted": (0.3, 0.07)}.items():
            torch.manual_seed(0)
            marks[f"normal {name} {dtype} {numel}"] = mark(torch.empty(numel, dtype=dtype).normal_(*bounds))
            torch.manual_seed(0)
            truncated = torch.nn.init.trunc_normal_(torch.empty(numel, dtype=dtype), *bounds, -0.1, 1.0)
            marks[f"truncated {name} {dtype} {numel}"] = mark(truncated)
values = torch.arange(1, 5001) / 7
marks["arithmetic"] = mark(((values * 3.3 + 1.7) / 0.9 - values).sqrt().neg().bfloat16())
print(json.dumps(marks))
"""
TRIAL = 1 << 16


def measured(**variables: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    marks: dict[str, str] = json.loads(done.stdout)
    return marks


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="this CPU has one capability only"
)
def test_fills_are_alike_where_they_are_said_to_be() -> None:
    here, narrow = measured(OMP_NUM_THREADS="1"), measured(OMP_NUM_THREADS="1", ATEN_CPU_CAPABILITY="avx2")
    assert here == narrow
    assert here == measured(OMP_NUM_THREADS="2")
    default = measured(OMP_NUM_THREADS="1", ATEN_CPU_CAPABILITY="default")
    differing = {name for name in here if here[name] != default[name]}
    assert "normal plain torch.float32 5003" in differing
    assert "uniform linear torch.float32 5003" in differing
    assert not [name for name in differing if name.startswith(("uniform zero", "uniform power", "arithmetic"))]
