"""On 2 ranks: with activation checkpointing a model gets the bits that it gets without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from nucleate import Runtime
from nucleate.strategies import DDPStrategy, FSDPStrategy
from nucleate.strategies.base import Strategy
from tests.multi.device import accelerator, device


class Layer(nn.Module):
    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 10)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        Layer.runs += 1
        return self.dropout(torch.tanh(self.linear(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = x + layer(x) * scale
        return {"hidden": x}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(10, 1)
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=self.temperature)["hidden"]
        return self.head(x)


def trained(strategy: Strategy, precision: str | None) -> dict[str, Tensor]:
    """Return the shards and gradients after two steps, the second with a micro-batch that is not exchanged."""
    runtime = Runtime(accelerator=accelerator(), strategy=strategy, precision=precision)
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        original = Model()
    model, optimizer = runtime.setup(original, torch.optim.AdamW(original.parameters(), lr=0.1))
    for number in range(2):
        optimizer.zero_grad()
        torch.manual_seed(10 * number + runtime.global_rank)
        for index in range(2):
            with runtime.no_backward_sync(model, enabled=number == 1 and index == 0):
                runtime.backward(model(torch.randn(4, 10, device=device())).square().mean())
        runtime.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
    with torch.no_grad():
        model(torch.ones(4, 10, device=device()))
    if isinstance(strategy, FSDPStrategy) and len(strategy.dimensions) > 1:
        clone = copy.deepcopy(model.module)
        assert num_checkpointed(clone) == num_checkpointed(original) > 0
        clone(torch.ones(4, 10, device=device(), dtype=original.head.weight.dtype)).sum().backward()
    found = {f"{name}.grad": local(parameter.grad) for name, parameter in original.named_parameters()}
    return {**found, **{name: local(parameter) for name, parameter in original.named_parameters()}}


def num_checkpointed(model: nn.Module) -> int:
    return sum("forward" in vars(module) for module in model.modules())


def local(tensor: Any) -> Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def same_bits(make: Callable[[Any], Strategy], policy: Any, precision: str | None = None) -> None:
    Layer.runs = 0
    expected = trained(make(None), precision)
    num_runs, Layer.runs = Layer.runs, 0
    found = trained(make(policy), precision)
    assert Layer.runs > num_runs
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
CASES: dict[str, tuple[Callable[[Any], Strategy], Any]] = {
    "ddp": (lambda policy: DDPStrategy(activation_checkpointing_policy=policy), {Block}),
    "ddp static": (lambda policy: DDPStrategy(activation_checkpointing_policy=policy, static_graph=True), {Block}),
    "units": (lambda policy: FSDPStrategy(activation_checkpointing_policy=policy), "auto"),
    "units around": (lambda policy: FSDPStrategy(wrap={Block}, activation_checkpointing_policy=policy), {Layer}),
    "units inside": (lambda policy: FSDPStrategy(wrap={Layer}, activation_checkpointing_policy=policy), {Block}),
    "nested": (
        lambda policy: FSDPStrategy(wrap={Layer, Block}, activation_checkpointing_policy=policy),
        {Layer, Block},
    ),
    "fabric": (
        lambda policy: FSDPStrategy(
            auto_wrap_policy={Block},
            activation_checkpointing_policy=policy,
            sharding_strategy="SHARD_GRAD_OP",
            state_dict_type="full",
            limit_all_gathers=True,
            timeout=None,
        ),
        ModuleWrapPolicy({Block}),
    ),
    "offload": (lambda policy: FSDPStrategy(cpu_offload=True, activation_checkpointing_policy=policy), {Block}),
    "cast": (lambda policy: FSDPStrategy(mixed_precision=POLICY, activation_checkpointing_policy=policy), {Block}),
}

for name, (make, policy) in CASES.items():
    same_bits(make, policy)
    print(name, "holds", flush=True)
for precision in ("bf16-mixed", "bf16-true"):
    same_bits(CASES["units"][0], "auto", precision)
    same_bits(CASES["ddp"][0], {Block}, precision)
print("all bits are the same")
