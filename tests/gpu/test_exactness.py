"""Deferred construction on the device is eager construction under `torch.device(...)`, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.deferred import deferred
from nucleate.devices import philox
from nucleate.materialize import materialize
from nucleate.precision.casting import default_dtype
from tests.deferred.equality import named_tensors
from tests.gpu.device import DEVICE_TYPE, DeviceMemory, device, free_bytes, only_on_gpu
from tests.gpu.models import (
    assert_deferred_is_eager,
    assert_same_values,
    construct,
    next_numbers,
    wholes,
)
from tests.zoo import ZOO

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# torch has no QR for half dtypes, and this model calls `orthogonal_`.
CASES = [(name, dtype) for name in ZOO for dtype in DTYPES if name != "everything" or dtype.itemsize >= 4]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_models_are_eagers(name: str, dtype: torch.dtype) -> None:
    """Each model of the zoo in each dtype has eager's bits, and both generators stand where eager leaves them."""
    with default_dtype(dtype):
        assert_deferred_is_eager(ZOO[name][0])


def _reseeded() -> Tensor:
    torch.manual_seed(11)
    return torch.rand(6)


def _forked() -> Tensor:
    with torch.random.fork_rng([device().index], device_type=DEVICE_TYPE):
        inner = torch.rand(6)
    return inner + torch.rand(6)


def _of_an_own_generator() -> Tensor:
    generator = torch.Generator(device()).manual_seed(5)
    return torch.empty(1001).normal_(generator=generator) + torch.empty(1001).uniform_(generator=generator)


DRAWS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.empty(1001).normal_(2, 3),
    "large normal": lambda: torch.empty(700_001).normal_(),
    "uniform": lambda: torch.empty(1001).uniform_(-2, 5),
    "one": lambda: torch.empty(1).uniform_(),
    "none": lambda: torch.empty(0, 3).normal_(),
    "transposed": lambda: torch.empty(50, 30).t().normal_(),
    "every other": lambda: torch.zeros(64)[::2].normal_(),
    "randn": lambda: torch.randn(33, 77),
    "rand_like": lambda: torch.rand_like(torch.ones(33, 77)),
    "randint": lambda: torch.randint(100, (1000,)).float(),
    "randperm": lambda: torch.randperm(5000).float(),
    "bernoulli": lambda: torch.empty(999).bernoulli_(0.3),
    "exponential": lambda: torch.empty(999).exponential_(),
    "cauchy": lambda: torch.empty(999).cauchy_(),
    "log normal": lambda: torch.empty(999).log_normal_(),
    "geometric": lambda: torch.empty(999).geometric_(0.2),
    "multinomial": lambda: torch.multinomial(torch.ones(10), 5).float(),
    "dropout": lambda: F.dropout(torch.ones(1000), 0.4),
    "trunc_normal": lambda: nn.init.trunc_normal_(torch.empty(40, 50), std=0.02),
    "rejecting trunc_normal": lambda: nn.init.trunc_normal_(torch.empty(40, 50), a=-0.1, b=0.1),
    "orthogonal": lambda: nn.init.orthogonal_(torch.empty(20, 30)),
    "sparse": lambda: nn.init.sparse_(torch.empty(20, 30), 0.3),
    "of the CPU": lambda: torch.randn(1001, device="cpu").to(device()),
    "reseeded": _reseeded,
    "forked": _forked,
    "own generator": _of_an_own_generator,
}


@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_after_a_random_operation_is_eagers(name: str) -> None:
    """Each random operation of torch has eager's values, and so has what is drawn behind it."""

    def make() -> nn.Module:
        model = nn.Module()
        model.first = nn.Parameter(DRAWS[name]())
        model.behind = nn.Parameter(torch.rand(7))
        model.second = nn.Parameter(DRAWS[name]())
        model.last = nn.Parameter(torch.empty(300).normal_())
        return model

    assert_deferred_is_eager(make)


@pytest.mark.parametrize("empty_init", [True, False, None])
@pytest.mark.parametrize("name", ZOO)
def test_a_runtimes_models_are_eagers(name: str, empty_init: bool | None) -> None:
    """The same through `Runtime`, for each `empty_init`, with `verify="all"`, which makes everything a second time."""
    eager, expected = construct(ZOO[name][0])
    runtime = Runtime(accelerator=DEVICE_TYPE, strategy="single_device", verify="all")
    torch.manual_seed(3)
    with runtime.init_module(empty_init=empty_init):
        model = ZOO[name][0]()
    runtime.setup(model)
    for ours, eagers in zip(next_numbers(device()), expected, strict=True):
        assert torch.equal(ours, eagers), "a generator is elsewhere"
    assert_same_values(wholes(model), wholes(eager))


@pytest.mark.parametrize("name", ["gpt", "everything"])
def test_parts_that_are_made_in_any_order_are_eagers(name: str) -> None:
    """Each parameter is made by itself, the last one first, from a random state of its own."""
    eager, _ = construct(ZOO[name][0])
    torch.manual_seed(3)
    with device(), deferred(device()):
        model = ZOO[name][0]()
    for child in reversed(list(model.modules())):
        if not list(child.children()):
            materialize(child, device=device())
    materialize(model, device=device())
    assert_same_values(wholes(model), wholes(eager))


def test_a_record_for_the_cpu_is_made_on_the_cpu_and_moved() -> None:
    """A model recorded for the CPU keeps the CPU's numbers when `setup` moves it to the device."""
    torch.manual_seed(3)
    eager = ZOO["gpt"][0]()
    runtime = Runtime(accelerator=DEVICE_TYPE, strategy="single_device")
    torch.manual_seed(3)
    with deferred("cpu"):
        model = ZOO["gpt"][0]()
    runtime.setup(model)
    assert {tensor.device for tensor in named_tensors(model).values()} == {device()}
    assert_same_values(wholes(model), wholes(eager))


# -- Philox --------------------------------------------------------------------------------------------------


@only_on_gpu("philox")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_normal", [True, False], ids=["normal", "uniform"])
def test_a_fill_adds_to_the_offset_what_is_said(is_normal: bool, dtype: torch.dtype) -> None:
    """nucleate's own check of the offset's formula holds on this GPU, so that the fast way is taken."""
    assert philox.adds_as_described(is_normal, dtype, device())


@only_on_gpu("philox")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_normal", [True, False], ids=["normal", "uniform"])
def test_predicted_offsets_are_those_of_fills(is_normal: bool, dtype: torch.dtype) -> None:
    """The predicted offset is the real one for sizes around each bound of the formula, and for random sizes."""
    found = torch.cuda.get_device_properties(device())
    threads = found.multi_processor_count * found.max_threads_per_multi_processor
    bounds = [256, 1024, threads, 2 * threads, 4 * threads, 8 * threads, 12 * threads]
    sizes = {1, 2, 3, *(bound + more for bound in bounds for more in (-1, 0, 1))}
    sizes |= set(torch.randint(1, 8_000_000, (30,), generator=torch.Generator().manual_seed(0)).tolist())
    generator = torch.Generator(device())
    wrong = []
    for numel in sorted(sizes):
        generator.manual_seed(0)
        before = generator.get_state()
        tensor = torch.empty(numel, dtype=dtype, device=device())
        (tensor.normal_ if is_normal else tensor.uniform_)(generator=generator)
        predicted = philox.distance(is_normal, numel, dtype, device())
        assert predicted is not None
        if not torch.equal(generator.get_state(), philox.moved(before, predicted)):
            wrong.append((numel, predicted, generator.get_state().view(torch.int64).tolist()))
    assert not wrong, f"size, predicted offset, real state: {wrong[:10]}"


@only_on_gpu("philox")
def test_a_write_that_a_later_one_covers_is_passed_over_by_an_addition(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fill that nobody reads is not executed: the state behind it is an addition."""

    def make() -> nn.Module:
        layer = nn.Linear(2000, 1000)
        nn.init.normal_(layer.weight)
        return layer

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the first fill of the weight was executed to find the state behind it")

    monkeypatch.setattr("nucleate.deferred.replay.replayer.Replayer.behind", refuse)
    assert_deferred_is_eager(make, seed=1)


@only_on_gpu("sizes")
def test_a_fill_of_more_than_two_gib_is_eagers() -> None:
    """torch fills such a tensor in several kernels; the deferred one and what is drawn behind it are the same."""
    if free_bytes() < 7 * 2**30:
        pytest.skip(f"needs 7 GiB of device memory, {free_bytes() / 2**30:.1f} are free")

    def make() -> nn.Module:
        model = nn.Module()
        model.large = nn.Parameter(torch.empty(2**29 + 5).normal_())
        model.behind = nn.Parameter(torch.rand(7))
        return model

    eager, expected = construct(make)
    torch.manual_seed(3)
    with device(), deferred(device()):
        model = make()
    assert torch.equal(next_numbers(device())[0], expected[0])
    materialize(model, device=device())
    assert torch.equal(model.large, eager.large)
    assert torch.equal(model.behind, eager.behind)


def test_no_more_than_the_final_bytes_and_one_parameter_are_taken() -> None:
    """The peak of device memory is the model and one parameter more."""
    with device(), deferred(device()):
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))
    memory = DeviceMemory()
    materialize(model, device=device())
    assert 64 * 2**20 <= memory.held_bytes() <= 64.1 * 2**20
    assert memory.peak_bytes() <= 68.1 * 2**20
