"""`setup` refuses parameters that FSDP2 cannot shard, by name, before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate.errors import ConfigurationError
from nucleate.strategies import FSDPStrategy
from tests.device import ACCELERATOR

pytestmark = pytest.mark.usefixtures("factories_on_device")


def setup(build: Callable[[], nn.Module]) -> nn.Module:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="fsdp")
    with runtime.init_module():
        model = build()
    return runtime.setup(model)


@pytest.mark.parametrize("embedding", [nn.Embedding, nn.EmbeddingBag])
def test_trained_embeddings_with_sparse_gradients(embedding: type[nn.Embedding]) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(embedding(10, 4, sparse=True), nn.Linear(4, 4))

    with pytest.raises(ConfigurationError, match=r"0\.weight would get sparse gradients.*sparse=False.*strategy='ddp'"):
        setup(build)
    with pytest.raises(ConfigurationError, match="^weight would get sparse gradients"):
        setup(lambda: embedding(10, 4, sparse=True))

    def frozen() -> nn.Sequential:
        model = build()
        model[0].requires_grad_(False)
        return model

    setup(frozen)
    setup(lambda: nn.Sequential(embedding(10, 4), nn.Linear(4, 4)))


def test_a_model_that_is_sharded_already() -> None:
    model = setup(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    runtime = Runtime(accelerator=ACCELERATOR, strategy="fsdp")
    with pytest.raises(ConfigurationError, match=r"0.weight, 0.bias, 1.weight, 1.bias are sharded already.*construct"):
        runtime.setup(copy.deepcopy(model.module))


@pytest.mark.parametrize("size", [2, 3, -1, 0])
def test_a_smaller_mesh_that_does_not_divide_the_shards(size: int) -> None:
    with pytest.raises(ConfigurationError, match=f"reshard_after_forward={size} does not divide the 1 shards"):
        Runtime(accelerator=ACCELERATOR, strategy=FSDPStrategy(reshard_after_forward=size))
    for fine in (1, True, False, None):
        Runtime(accelerator=ACCELERATOR, strategy=FSDPStrategy(reshard_after_forward=fine))


def test_dtypes_are_compared_within_a_unit_only_among_what_is_sharded() -> None:
    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.actor = nn.Linear(4, 4)
            self.critic = nn.Linear(4, 4).double()
            self.log_std = nn.Parameter(torch.zeros(2, dtype=torch.float64))
            self.scale = nn.Parameter(torch.zeros(2))

    runtime = Runtime(accelerator=ACCELERATOR, strategy="fsdp")
    runtime.launch()
    runtime.strategy.setup(Agent())
