"""Models on a device, made eagerly and deferred, and how the two are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.accelerators.placement import place
from nucleate.deferred import deferred
from nucleate.materialize import materialize
from tests.deferred.equality import assert_same_model, named_tensors
from tests.gpu.device import device

CPU = torch.device("cpu")


def next_numbers(on: torch.device) -> tuple[Tensor, Tensor]:
    """Draw from the device's generator and from the CPU's."""
    return torch.rand(5, device=on).cpu(), torch.rand(5)


def construct(make: Callable[[], nn.Module], seed: int = 3, on: torch.device | None = None) -> tuple[nn.Module, Any]:
    """Make a model eagerly on the device; return it and what the generators give next."""
    on = on or device()
    torch.manual_seed(seed)
    with on:
        model = make()
    return model, next_numbers(on)


def assert_deferred_is_eager(make: Callable[[], nn.Module], seed: int = 3) -> nn.Module:
    """Make a model eagerly and deferred on the device, and compare both and the generators; return the second."""
    eager, expected = construct(make, seed)
    torch.manual_seed(seed)
    with device(), deferred(device()):
        model = make()
    for ours, eagers in zip(next_numbers(device()), expected, strict=True):
        assert torch.equal(ours, eagers), "the constructor left a generator elsewhere"
    torch.manual_seed(seed + 1)
    before = next_numbers(device())
    torch.manual_seed(seed + 1)
    materialize(model, device=device())
    for ours, eagers in zip(next_numbers(device()), before, strict=True):
        assert torch.equal(ours, eagers), "making the model moved a generator"
    assert {tensor.device for tensor in named_tensors(model).values()} <= {device()}
    assert_same_model(place(eager, CPU), place(model, CPU))
    return model


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor on the CPU, gathered from its shards; every rank calls it."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu().clone()


def wholes(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, gathered, on the CPU; every rank calls it."""
    return {name: whole(tensor) for name, tensor in named_tensors(model).items()}


def assert_same_values(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that tensors have the same names, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, f"{name} is {actual[name].dtype}, not {tensor.dtype}"
        assert torch.equal(actual[name], tensor), f"{name} differs"


def deferred_by(runtime: Runtime, make: Callable[[], nn.Module], seed: int = 3) -> nn.Module:
    """Construct a model that `setup` is to make."""
    torch.manual_seed(seed)
    with runtime.init_module(empty_init=True):
        return make()
