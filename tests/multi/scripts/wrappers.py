"""What wrappers, precision and seeds promise on a real group; run by test_wrappers.py."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nucleate import Runtime
from nucleate.cluster import Communicator
from nucleate.errors import UsageError
from nucleate.precision import FullPrecision, MixedPrecision
from nucleate.seed import RandomState
from nucleate.strategies.base import Strategy
from nucleate.wrappers import ModuleWrapper, OptimizerWrapper
from tests.multi.device import ACCELERATOR, accelerator, start_group


class Replicas(Strategy):
    name = "replicas"

    def module_init_context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def setup(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model)

    def guards_methods(self, module: nn.Module) -> bool:
        return True


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.last = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x))
        return out

    def loss(self, x: Tensor) -> Tensor:
        return self(x).square().mean()


def a_marked_method_exchanges_gradients(comm: Communicator) -> None:
    torch.manual_seed(0)
    model, strategy = Model(), Replicas()
    wrapper = ModuleWrapper(strategy.setup(model), model, FullPrecision(), strategy)
    data = torch.full((2, 4), float(comm.rank))
    with pytest.raises(UsageError, match="mark_forward_method"):
        wrapper.loss(data)
    wrapper.mark_forward_method("loss")
    wrapper.loss(data).backward()
    for name, parameter in wrapper.named_parameters():
        assert parameter.grad is not None, name
        everywhere = comm.all_gather(parameter.grad)
        assert torch.equal(everywhere[0], everywhere[1]), name
    assert list(wrapper.state_dict()) == ["first.weight", "first.bias", "last.weight", "last.bias"]


def a_training_step_exchanges_gradients_without_a_mark(comm: Communicator) -> None:
    class Stepping(Model):
        def training_step(self, x: torch.Tensor) -> torch.Tensor:
            return self(x).square().mean()

    for strategy in ("ddp", "fsdp"):
        runtime = Runtime(accelerator=accelerator(), strategy=strategy)
        with runtime.init_module(empty_init=True):
            model = Stepping()
        wrapper = runtime.setup(model)
        runtime.backward(wrapper.training_step(torch.full((2, 4), 1.0 + comm.rank)))
        with runtime.rank_zero_first(local=True):
            gradients = [parameter.grad for parameter in wrapper.parameters()]
        for gradient in gradients:
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            everywhere = comm.all_gather(whole)
            assert torch.equal(everywhere[0], everywhere[1]), strategy
            assert whole.abs().sum() > 0


def an_overflow_in_one_shard_skips_the_step_on_every_rank(comm: Communicator) -> None:
    for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        torch.manual_seed(0)
        model = Model()
        fully_shard(model.first)
        fully_shard(model)
        precision = MixedPrecision(
            torch.float16, device_type=ACCELERATOR, scaler=torch.amp.GradScaler(ACCELERATOR, init_scale=64.0)
        )
        optimizer = OptimizerWrapper(torch.optim.AdamW(model.parameters(), **options), precision)
        skipped = []
        for step in range(3):
            optimizer.zero_grad()
            with precision.forward_context():
                loss = model(torch.randn(2, 4)).float().square().mean()
            precision.scale(loss).backward()
            if step == 1 and comm.rank == 1:
                model.first.weight.grad.to_local().fill_(float("inf"))
            before = model.last.weight.to_local().clone()
            optimizer.step()
            skipped.append(torch.equal(before, model.last.weight.to_local()))
        assert skipped == [False, True, False], options
        assert precision.state_dict()["scale"] == 32.0


def every_rank_gets_back_its_own_random_state(comm: Communicator) -> None:
    torch.manual_seed(comm.rank)
    random.seed(comm.rank)
    state = RandomState().state_dict()
    assert list(state) == [f"rank_{rank}" for rank in range(comm.world_size)]
    expected = torch.rand(3), random.random()
    assert not torch.equal(*comm.all_gather(expected[0])[:2])
    RandomState().load_state_dict(state)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


CHECKS: list[Callable[[Communicator], None]] = [
    a_marked_method_exchanges_gradients,
    a_training_step_exchanges_gradients_without_a_mark,
    an_overflow_in_one_shard_skips_the_step_on_every_rank,
    every_rank_gets_back_its_own_random_state,
]

if __name__ == "__main__":
    communicator = start_group()
    for check in CHECKS:
        check(communicator)
        sys.stdout.write(f"{check.__name__}\n")
