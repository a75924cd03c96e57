"""On 2 ranks: torchrec's collections and models are exact under ddp and fsdp, and take eager torch's step."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nucleate import Runtime
from tests.architectures.torchrec_family import TorchrecFamily, forward
from tests.multi.device import accelerator

# What torchrec and its compiled part warn of when they are imported.
warnings.simplefilter("ignore")

MODELS = ["EmbeddingBagCollection", "EmbeddingCollection", "DLRM", "DLRM_DCN", "SimpleDeepFMNN"]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def seeded(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    return make(), torch.get_rng_state()


def is_exact_and_trains(name: str, strategy: str) -> None:
    make = TorchrecFamily().case(name).make
    expected, after = seeded(make)
    # One table is fp16 by its configuration. This precision casts it.
    expected.float()
    runtime = Runtime(accelerator=accelerator(), strategy=strategy, precision="32-true")
    with runtime.init_module(empty_init=True):
        original, _ = seeded(make)
    model, optimizer = runtime.setup(original, torch.optim.SGD(original.parameters(), lr=0.1))
    assert torch.equal(torch.get_rng_state(), after)
    pairs = list(zip(original.named_parameters(), expected.parameters(), strict=True))
    for (fqn, parameter), other in pairs:
        assert torch.equal(whole(parameter), other), fqn
    output = forward(model, kind=original)
    assert torch.equal(output, forward(expected))
    runtime.backward(output.square().sum())
    optimizer.step()
    forward(expected).square().sum().backward()
    for (fqn, parameter), other in pairs:
        torch.testing.assert_close(whole(parameter), other - 0.1 * other.grad, msg=lambda m, n=fqn: f"{n}: {m}")


for name in MODELS:
    for strategy in ("ddp", "fsdp"):
        is_exact_and_trains(name, strategy)
print("recommenders are exact")
