"""On 2 ranks: a lazy module is refused on every rank, and works after a dry run. Argument: the name of a strategy."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.errors import RankFailedError, UninitializedError
from tests.deferred.equality import bits, named_tensors
from tests.multi.device import accelerator, device

runtime = Runtime(accelerator=accelerator(), strategy=sys.argv[1])


def build(dry: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyConv1d(5, 3), nn.LazyBatchNorm1d(), nn.Flatten(), nn.LazyLinear(3))
    if dry:
        model(torch.ones(2, 4, 6, device=device()))
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


for how in (True, False, None):
    with runtime.init_module(empty_init=how):
        model = build(dry=False)
    with pytest.raises(UninitializedError, match=r"^0\.weight, 0\.bias, 1\.weight, .* have no shape yet"):
        runtime.setup(model)

    # On one rank only: the other does not wait for it.
    with runtime.init_module(empty_init=how):
        model = build(dry=runtime.global_rank == 0)
    with pytest.raises((UninitializedError, RankFailedError), match="have no shape yet"):
        runtime.setup(model)

    expected = build()
    with runtime.init_module(empty_init=how):
        model = build()
    wrapped, optimizer = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    actual = named_tensors(model)
    for name, tensor in named_tensors(expected).items():
        assert bits(tensor) == bits(whole(actual[name])), f"{name} differs with empty_init={how}"
    runtime.backward(wrapped(torch.ones(2, 4, 6, device=device())).square().sum())
    optimizer.step()
    runtime.print(f"empty_init={how} holds")
