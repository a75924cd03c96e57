"""On 2 ranks: every policy of FSDP and DDP trains as one process on the whole batch does, and syncs when it should."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from nucleate import Runtime
from nucleate.errors import UsageError
from nucleate.strategies import DDPStrategy, FSDPStrategy
from nucleate.strategies.base import Strategy
from tests.multi.device import accelerator, device


class Block(abc.ABC, nn.Module):
    """Has a first base with which torch's own `fully_shard` fails (`nucleate.dimensions.sharding.sharded_class`)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 21)
        self.down = nn.Linear(21, 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.frozen = nn.Linear(10, 10).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        # What is not trained may have another dtype than what is.
        self.codes = nn.Parameter(torch.arange(10, dtype=torch.uint8).unsqueeze(1), requires_grad=False)
        self.head = nn.Linear(10, 1)
        self.head.weight.group = "head"
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.frozen(x + self.codes.squeeze(1).to(x.dtype))) * self.temperature.exp()

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        return (self(x) - targets).square().mean()


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device()).manual_seed(step)
    return torch.randn(8, 10, generator=generator), torch.randn(8, 1, generator=generator)


def reference(steps: int, max_norm: float) -> tuple[list[float], list[float], Model]:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, norms = [], []
    for step in range(steps):
        loss = model.loss(*data(step))
        loss.backward()
        losses.append(loss.item())
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def start(strategy: Strategy) -> tuple[Runtime, Any, Any, Model]:
    runtime = Runtime(accelerator=accelerator(), strategy=strategy)
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        original = Model()
    optimizer = torch.optim.SGD(original.parameters(), lr=0.1)
    model, wrapped = runtime.setup(original, optimizer)
    return runtime, model, wrapped, original


def trains_as_one_process(make: Callable[[], Strategy], rtol: float = 1e-4) -> None:
    runtime, model, optimizer, original = start(make())
    losses, norms, expected = reference(4, max_norm=0.5)
    assert original.head.weight.group == "head"
    for step in range(4):
        x, targets = (part.chunk(2)[runtime.global_rank] for part in data(step))
        loss = (model(x) - targets).square().mean()
        runtime.backward(loss)
        norm = runtime.clip_gradients(model, optimizer, max_norm=0.5)
        torch.testing.assert_close(float(runtime.all_reduce(loss.detach())), losses[step], rtol=rtol, atol=1e-5)
        torch.testing.assert_close(float(norm), norms[step], rtol=rtol, atol=1e-5)
        optimizer.step()
        optimizer.zero_grad()
    for (name, parameter), other in zip(original.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(
            whole(parameter).to(other.device), other, rtol=rtol, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def accumulates_as_one_process(make: Callable[[], Strategy]) -> None:
    """Two micro-batches, the first without exchange, equal one batch of both; enabled=False exchanges."""
    runtime, model, optimizer, original = start(make())
    _, _, expected = reference(1, max_norm=1e9)
    x, targets = data(0)
    micro = [(x[i::4], targets[i::4]) for i in (runtime.global_rank, runtime.global_rank + 2)]
    for index, (inputs, goals) in enumerate(micro):
        with runtime.no_backward_sync(model, enabled=index == 0):
            runtime.backward((model(inputs) - goals).square().mean() / 2)
    optimizer.step()
    for parameter, other in zip(original.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter).to(other.device), other, rtol=1e-4, atol=1e-5)


def methods_go_through_the_strategy(make: Callable[[], Strategy]) -> None:
    runtime, model, optimizer, original = start(make())
    share = [part.chunk(2)[runtime.global_rank] for part in data(0)]
    if isinstance(runtime.strategy, DDPStrategy):
        with pytest.raises(UsageError, match=r"mark_forward_method\('loss'\)"):
            model.loss(*share)
    model.mark_forward_method("loss")
    _, _, expected = reference(1, max_norm=1e9)
    runtime.backward(model.loss(*share))
    optimizer.step()
    for parameter, other in zip(original.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter).to(other.device), other, rtol=1e-4, atol=1e-5)


POLICIES: dict[str, Callable[[], Strategy]] = {
    "auto": FSDPStrategy,
    "classes": lambda: FSDPStrategy(wrap={Block}),
    "predicate": lambda: FSDPStrategy(wrap=lambda name, module: name.endswith("up")),
    "offload": lambda: FSDPStrategy(cpu_offload=True),
    "kept": lambda: FSDPStrategy(reshard_after_forward=False),
    "replicas": lambda: FSDPStrategy(num_replicas=2),
    "ddp": lambda: DDPStrategy(find_unused_parameters=True),
    "ddp static": lambda: DDPStrategy(find_unused_parameters=True, gradient_as_bucket_view=False, bucket_cap_mb=0.001),
    "ddp own buffers": lambda: DDPStrategy(find_unused_parameters=True, sync_buffers=False),
}

for name, make in POLICIES.items():
    trains_as_one_process(make)
    print(name, "trains")
mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
trains_as_one_process(lambda: FSDPStrategy(mixed_precision=mixed), rtol=5e-2)
for make in (FSDPStrategy, lambda: DDPStrategy(find_unused_parameters=True)):
    accumulates_as_one_process(make)
    methods_go_through_the_strategy(make)
print("all policies hold")
