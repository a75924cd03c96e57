"""Verification on several ranks: healthy models pass, and what one rank alone gets wrong is an error on all of them.

Arguments: the names of strategies to try.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.errors import NucleateError, RankDisagreementError, RankFailedError, VerificationError
from nucleate.strategies.base import Strategy
from tests.multi.device import accelerator
from tests.multi.exactness import make_strategy
from tests.zoo import ZOO


class Meddler(Strategy):
    """Does what another strategy does, and then changes one element of what this rank holds."""

    name = "meddler"
    distributed = True

    def __init__(self, inner: Strategy, fqn: str, rank: int, place: int) -> None:
        self.inner = inner
        self.fqn = fqn
        self.rank = rank
        self.place = place

    def connect(self, device: torch.device, environment: Any) -> None:
        super().connect(device, environment)
        self.inner.connect(device, environment)

    def module_init_context(self) -> AbstractContextManager[object]:
        return self.inner.module_init_context()

    def setup(self, model: nn.Module) -> nn.Module:
        forward_module = self.inner.setup(model)
        if self.environment.global_rank == self.rank:
            tensor: Any = dict([*model.named_parameters(), *model.named_buffers()])[self.fqn]
            local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            local.detach().view(-1).view(torch.int32)[self.place] ^= 1
        return forward_module


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # So large that `verify_replicas` looks at every third element only.
        self.layers = nn.ModuleList(nn.Linear(128, 100) for _ in range(2))
        nn.init.orthogonal_(self.layers[1].weight)
        self.register_buffer("table", torch.linspace(0, 1, 7).exp())


def expect(strategy: Strategy, verify: Any, message: str, rank: int, adopt: bool = False) -> None:
    runtime = Runtime(accelerator=accelerator(), strategy=strategy, verify=verify)
    with runtime.init_module(empty_init=not adopt):
        model = Model()
    with pytest.raises(NucleateError, match=message) as caught:
        runtime.setup(model)
    expected = VerificationError if runtime.global_rank == rank or rank < 0 else RankFailedError
    assert caught.type is expected, (caught.type, caught.value)


for name in sys.argv[1:]:
    # Healthy, in whole and in a sample, deferred and not.
    for key, (make, _) in ZOO.items():
        for verify in (True, "all"):
            runtime = Runtime(accelerator=accelerator(), strategy=make_strategy(name), verify=verify)
            with runtime.init_module(empty_init=key != "gpt" or verify is True):
                model = make()
            runtime.setup(model)

    last = runtime.world_size - 1
    for verify in (True, "all"):
        # In a shard the rank with the mistake says which element of the whole it is; a replica's buffer is one, too.
        row = 0 if name == "ddp" else 50  # Two shards of 100 rows.
        found = rf"layers\.0\.weight on rank {last} differs from its recipe.*element \({row + 1}, 2\) is .* but should"
        expect(Meddler(make_strategy(name), "layers.0.weight", last, 130), verify, found, last)
        expect(Meddler(make_strategy(name), "layers.1.weight", 0, 7), verify, r"1\.weight on rank 0.*\(0, 7\)", 0)
        expect(Meddler(make_strategy(name), "table", last, 3), verify, rf"table on rank {last}.*element \(3,\)", last)

    # What was never deferred has no recipe, but copies of it are compared to the last element.
    if name != "fsdp":
        found = rf"different values of layers\.0\.weight \(rank {last}\)"
        expect(Meddler(make_strategy(name), "layers.0.weight", last, 1), True, found, -1, adopt=True)

    # One rank alone cannot verify.
    runtime = Runtime(
        accelerator=accelerator(),
        strategy=make_strategy(name),
        verify=Runtime(accelerator=accelerator()).is_global_zero,
    )
    with pytest.raises(RankDisagreementError, match="verify is True on rank 0 but False on rank 1"):
        runtime.setup(nn.Linear(2, 2))
print("verified", flush=True)
