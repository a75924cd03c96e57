"""Conversions of a plan: the bits of eager conversion, in one pass, without the whole tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.deferred import RangeMaker, convert, deferred, resumed
from nucleate.errors import ConversionError, DeferredUseError
from nucleate.materialize import Plan, materialize
from nucleate.testing import peak_memory
from tests.deferred.rows import Blocks, Rows
from tests.device import ACCELERATOR, cpu_only, device

pytestmark = pytest.mark.usefixtures("factories_on_device")

MIB = 2**20


class Quantized(nn.Module):
    """A layer that holds codes and scales of a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        codes, scales = convert(weight, Rows())
        self.codes, self.scales = nn.Parameter(codes, requires_grad=False), nn.Parameter(scales, requires_grad=False)


class Chained(nn.Module):
    """One that holds codes, and what another conversion makes of the scales."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        codes, scales = convert(weight, Rows())
        pairs, sums = convert(scales, Blocks())
        self.codes, self.pairs, self.sums = (nn.Parameter(t, requires_grad=False) for t in (codes, pairs, sums))


def build(layer: type[nn.Module], init: Callable[[Tensor], object], dtype: torch.dtype) -> nn.ModuleList:
    torch.manual_seed(0)
    linears = [nn.Linear(257, 65, dtype=dtype) for _ in range(3)]
    for linear in linears:
        init(linear.weight)
    return nn.ModuleList(layer(linear.weight) for linear in linears)


INITS = {
    "fill": lambda weight: nn.init.normal_(weight),
    "fill and arithmetic": lambda weight: weight.data.mul_(0.5).add_(1),
    "whole": lambda weight: nn.init.orthogonal_(weight.data) if weight.dtype == torch.float32 else weight.data.exp_(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("layer", [Quantized, Chained])
def test_the_outputs_are_those_of_eager_conversion(layer: type[nn.Module], init: str, dtype: torch.dtype) -> None:
    eager = build(layer, INITS[init], dtype)
    after = torch.get_rng_state()
    with deferred(device()):
        model = build(layer, INITS[init], dtype)
    materialize(model, device())
    for (name, expected), (_, made) in zip(eager.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(expected, made), name
    assert torch.equal(after, torch.get_rng_state())


@cpu_only("a device with a generator of its own makes a tensor whole, not in ranges")
def test_each_range_of_the_source_is_made_once_for_all_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    with deferred(device()):
        model = build(Chained, INITS["fill"], torch.float32)
    made: list[int] = []
    real = RangeMaker.make

    def counted(self: RangeMaker, start: int, out: Tensor, cursors: object) -> None:
        made.append(out.numel())
        real(self, start, out, cursors)  # type: ignore[arg-type]

    monkeypatch.setattr(RangeMaker, "make", counted)
    materialize(model, device())
    assert sum(made) == 3 * 257 * 65


def test_a_tensor_that_changes_later_is_converted_as_it_was() -> None:
    def build() -> nn.Module:
        torch.manual_seed(1)
        linear = nn.Linear(8, 8)
        linear.quantized = Quantized(linear.weight)
        linear.weight.data.zero_()
        return linear

    eager = build()
    with deferred(device()):
        model = build()
    materialize(model, device())
    assert torch.equal(eager.quantized.codes, model.quantized.codes)
    assert not model.weight.any()


def test_operations_on_an_output_are_replayed() -> None:
    def build() -> nn.Module:
        torch.manual_seed(1)
        module = Quantized(torch.nn.Linear(8, 8).weight)
        module.scales.data = (module.scales * 2).to(torch.bfloat16)
        return module

    eager = build()
    with deferred(device()):
        model = build()
    materialize(model, device())
    assert torch.equal(eager.codes, model.codes)
    assert torch.equal(eager.scales, model.scales)


def test_a_tensor_of_a_file_is_converted_while_it_is_read_and_cast(tmp_path: Path) -> None:
    weight = torch.randn(30, 50)
    save_file({"weight": weight}, tmp_path / "a.safetensors")
    runtime = Runtime(accelerator=ACCELERATOR, precision="32-true")
    with runtime.init_module(empty_init=True):
        linear = nn.Linear(50, 30, bias=False, dtype=torch.bfloat16)
    runtime.load_raw(tmp_path / "a.safetensors", linear)
    with resumed(linear):
        model = Quantized(linear.weight)
    materialize(model, device())
    assert torch.equal(model.codes, convert(weight.bfloat16(), Rows())[0])


def test_a_value_that_cannot_be_converted_is_told_by_name_and_the_model_stays_deferred(tmp_path: Path) -> None:
    weight = torch.randn(30, 50)
    weight[17, 3] = torch.nan
    save_file({"weight": weight}, tmp_path / "a.safetensors")
    runtime = Runtime(accelerator=ACCELERATOR)
    with runtime.init_module(empty_init=True):
        linear = nn.Linear(50, 30, bias=False)
    runtime.load_raw(tmp_path / "a.safetensors", linear)
    with resumed(linear):
        model = nn.Sequential(Quantized(linear.weight))
    with pytest.raises(ConversionError, match=r"0\.codes: .*not finite"):
        materialize(model, device())
    with pytest.raises(DeferredUseError):
        model[0].codes.tolist()


def test_the_digest_of_a_plan_tells_conversions_apart() -> None:
    def digest(limit: float) -> str:
        torch.manual_seed(0)
        with deferred(device()):
            module = nn.Module()
            module.codes = nn.Buffer(convert(nn.Linear(4, 4).weight, Rows(limit))[0])
        return Plan.of(module).digest()

    assert digest(127.0) == digest(127.0) != digest(126.0)


def test_verification_makes_outputs_again() -> None:
    runtime = Runtime(accelerator=ACCELERATOR, verify="all")
    with runtime.init_module(empty_init=True):
        model = build(Chained, INITS["fill"], torch.float32)
    runtime.setup(model)


BUILD = """
import torch
from torch import nn
from nucleate.deferred import convert, deferred
from nucleate.materialize import materialize
from tests.deferred.rows import Rows

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        for number in range(4):
            codes, scales = convert(nn.Linear(4096, 4096, bias=False).weight, Rows())
            self.register_buffer(f"codes{number}", codes)
            self.register_buffer(f"scales{number}", scales)

with deferred():
    warm = nn.Linear(4, 4)
materialize(warm)
with deferred():
    model = Model()
"""


def test_the_source_is_never_whole_in_memory() -> None:
    # 64 MiB of each weight, 16 MiB of its codes. A thread holds 4 pieces of 4 MiB: the values and three that the
    # conversion makes of them. The allocator may keep as much again. One thread, or it would keep that for each.
    setup = "import torch; torch.set_num_threads(1)\n" + BUILD
    assert peak_memory("materialize(model)", setup).added_bytes < (64 + 2 * 4 * 4 + 8) * MIB
