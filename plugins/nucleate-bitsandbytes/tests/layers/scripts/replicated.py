"""On several ranks: DDP takes quantized layers, trains what is beside them, and leaves them as they are."""

from __future__ import annotations

import copy

import torch
from torch import nn

from nucleate import Runtime
from nucleate_bitsandbytes.layers import FourBitWeight, Linear4bit, Linear8bit


def build() -> nn.Module:
    """Make a 4-bit and an int8 layer of random codes, with adapters' kind of parameters beside them."""
    weight = FourBitWeight(
        codes=torch.randint(0, 256, (32 * 64 // 2, 1), dtype=torch.uint8),
        absmax=torch.randint(0, 256, (32,), dtype=torch.uint8),
        quant_type="nf4",
        nested_absmax=torch.rand(1) * 0.1,
        offset=torch.ones(()),
    )
    codes = torch.randint(-127, 128, (8, 32), dtype=torch.int8)
    first = Linear4bit(64, 32, weight, nn.Parameter(torch.randn(32)))
    return nn.Sequential(nn.LayerNorm(64), first, Linear8bit(32, 8, codes, torch.rand(8) + 0.5), nn.Linear(8, 1))


runtime = Runtime(accelerator="cpu", strategy="ddp")
torch.manual_seed(0)
expected = build()
torch.manual_seed(0)
with runtime.init_module(empty_init=True):
    original = build()
model = runtime.strategy.setup(original)
assert isinstance(model, nn.parallel.DistributedDataParallel)
frozen = {name: tensor.clone() for name, tensor in original.named_parameters() if not tensor.requires_grad}
assert len(frozen) == 5
for module in (model, expected):
    torch.manual_seed(1)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=2**-8)
    for _ in range(3):
        x = torch.randn(16, 64)
        with torch.no_grad():
            module.eval()(x.bfloat16().float())
        # As each rank has the same batch, the mean of the gradients is each rank's.
        module.train()(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
assert all(torch.equal(dict(original.named_parameters())[name], tensor) for name, tensor in frozen.items())
state, wanted = original.state_dict(), expected.state_dict()
assert all(torch.equal(state[name], wanted[name]) for name in wanted)
assert not torch.equal(copy.deepcopy(expected)[3].weight, build()[3].weight)
print("all hold")
