"""Lazy modules: `setup` refuses them by name under every strategy, and takes them after a dry run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from nucleate import Runtime
from nucleate.deferred import handle_of
from nucleate.errors import UninitializedError
from nucleate.materialize.lazy_modules import refuse_uninitialized
from tests.deferred.equality import assert_same_model
from tests.device import ACCELERATOR, device, on_device

STRATEGIES = ["single_device", "ddp", "fsdp"]


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, device=device())


LAZY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LazyLinear": (lambda: nn.LazyLinear(3), (2, 4)),
    "LazyConv1d": (lambda: nn.LazyConv1d(3, 2), (1, 2, 5)),
    "LazyConv2d": (lambda: nn.LazyConv2d(3, 2), (1, 2, 5, 5)),
    "LazyConv3d": (lambda: nn.LazyConv3d(3, 2), (1, 2, 5, 5, 5)),
    "LazyConvTranspose1d": (lambda: nn.LazyConvTranspose1d(3, 2), (1, 2, 5)),
    "LazyConvTranspose2d": (lambda: nn.LazyConvTranspose2d(3, 2), (1, 2, 5, 5)),
    "LazyConvTranspose3d": (lambda: nn.LazyConvTranspose3d(3, 2), (1, 2, 5, 5, 5)),
    "LazyBatchNorm1d": (nn.LazyBatchNorm1d, (2, 4)),
    "LazyBatchNorm2d": (nn.LazyBatchNorm2d, (2, 4, 3, 3)),
    "LazyBatchNorm3d": (nn.LazyBatchNorm3d, (2, 4, 3, 3, 3)),
    "LazyInstanceNorm1d": (lambda: nn.LazyInstanceNorm1d(affine=True), (2, 4, 3)),
    "LazyInstanceNorm2d": (lambda: nn.LazyInstanceNorm2d(affine=True), (2, 4, 3, 3)),
    "LazyInstanceNorm3d": (lambda: nn.LazyInstanceNorm3d(affine=True), (2, 4, 3, 3, 3)),
}


class Learned(LazyModuleMixin, nn.Module):
    """A lazy module of a user."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.UninitializedParameter()
        self.register_buffer("seen", nn.UninitializedBuffer())

    def initialize_parameters(self, x: Tensor) -> None:
        if self.has_uninitialized_params():
            with torch.no_grad():
                self.weight.materialize(x.shape[-1:])
                nn.init.normal_(self.weight)
                self.seen.materialize((2,))
                self.seen.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.seen.sum()


def test_every_lazy_class_of_torch_is_tried() -> None:
    assert set(LAZY) == {name for name in dir(nn) if name.startswith("Lazy")}


@pytest.mark.parametrize("how", [True, False, None])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_setup_refuses_them_by_name_before_it_changes_anything(strategy: str, how: bool | None) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy=strategy)
    with runtime.init_module(empty_init=how):
        model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3), nn.LazyBatchNorm1d(), Learned())
    before = [(id(tensor), handle_of(tensor)) for tensor in (*model.parameters(), *model.buffers())]
    state = torch.get_rng_state()
    with pytest.raises(UninitializedError) as raised:
        runtime.setup(model)
    message = str(raised.value)
    assert message.startswith(
        "1.weight, 1.bias, 2.weight, 2.bias, 2.running_mean, 2.running_var, 3.weight, 3.seen have no shape yet. "
        "Lazy modules (LazyLinear, LazyBatchNorm1d, Learned) take it from their first input."
    )
    assert "inside the `init_module` block, before `setup`: `model(batch)`" in message
    assert before == [(id(tensor), handle_of(tensor)) for tensor in (*model.parameters(), *model.buffers())]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("how", [True, False, None])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [*LAZY, "Learned"])
def test_a_dry_run_inside_the_block_gives_what_eager_construction_gives(
    name: str, strategy: str, how: bool | None
) -> None:
    make, shape = LAZY.get(name, (Learned, (2, 4)))

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(make(), nn.Tanh())  # FSDP warns of a view as output.
        model(ones(*shape))
        return model

    with on_device():
        expected = build()
    runtime = Runtime(accelerator=ACCELERATOR, strategy=strategy)
    with runtime.init_module(empty_init=how):
        model = build()
    wrapped = runtime.setup(model)
    if strategy != "fsdp":
        assert_same_model(expected, model)
    output = wrapped(ones(*shape))
    torch.testing.assert_close(output, expected(ones(*shape)))
    runtime.backward(output.square().sum())
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("call", ["load_raw", "load_state_dict"])
def test_weights_that_are_loaded_give_the_shapes(tmp_path: Path, call: str, strategy: str) -> None:
    source = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    save_file(source.state_dict(), tmp_path / "m.safetensors")
    runtime = Runtime(accelerator=ACCELERATOR, strategy=strategy)
    with runtime.init_module(empty_init=True):
        model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    if call == "load_raw":
        runtime.load_raw(tmp_path / "m.safetensors", model)
    else:
        model.load_state_dict(source.state_dict())
    wrapped = runtime.setup(model)
    source.to(device())
    torch.testing.assert_close(wrapped(ones(2, 4)), source(ones(2, 4)))


def test_modules_that_are_not_lazy_are_not_looked_at_closer() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))
    model[1].register_buffer("absent", None)
    refuse_uninitialized(model)
    refuse_uninitialized(nn.ReLU())
