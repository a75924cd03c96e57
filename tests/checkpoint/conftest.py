"""What the checkpoint tests share: a single process, and a small model with a tie and both kinds of buffers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nucleate.cluster import Communicator, Environment
from tests.device import device


class Tied(nn.Module):
    """An embedding tied to its head, a batch norm, a persistent and a non-persistent buffer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((), 0.5))
        self.register_buffer("cache", torch.arange(3.0), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(tokens)) * self.scale)


@pytest.fixture
def solo() -> Communicator:
    return Communicator(Environment(), device())


@pytest.fixture
def make_tied() -> type[Tied]:
    return Tied
