"""The models of the exactness matrix: what real architectures do to initialization, at sizes ranks do not divide."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from gpt import GPT, GPTConfig


class ConvNet(nn.Module):
    """Convolutions with batch norm: running statistics and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3)
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(7, 7, 3), nn.BatchNorm2d(7), nn.ReLU()) for _ in range(3))
        )
        self.head = nn.Linear(7, 5)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


class Recurrent(nn.Module):
    """A bidirectional LSTM, which keeps its weights in a list as well."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(9, 11, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(22, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Encoder(nn.Module):
    """torch's own transformer, whose layers are copies that are initialized once more."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(18, 2, 2, 2, 30, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer(x, x)


class Everything(nn.Module):
    """The initializers, ties, buffers and sizes that frameworks get wrong, in one model."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(101, 13, padding_idx=0)
        self.blocks = nn.ModuleList(nn.Linear(13, 13) for _ in range(3))
        for block in self.blocks:
            nn.init.orthogonal_(block.weight)
        self.normed = parametrizations.weight_norm(nn.Linear(13, 13))
        self.truncated = nn.Parameter(nn.init.trunc_normal_(torch.empty(13, 13), std=0.02))
        self.rejected = nn.Parameter(nn.init.trunc_normal_(torch.empty(5, 13), std=1.0, a=-0.1, b=0.1))
        self.raw = nn.Parameter(torch.randn(3, 13) / 7 + torch.eye(3, 13))
        self.one = nn.Parameter(torch.rand(1))
        self.register_buffer("table", 1 / 10_000 ** (torch.arange(0, 13.0) / 13), persistent=False)
        self.register_buffer("noise", torch.rand(6))
        self.head = nn.Linear(13, 101, bias=False)
        self.head.weight = self.embedding.weight
        # As transformers and nanoGPT do: a last pass initializes a part of it all again.
        self.apply(self._again)

    @staticmethod
    def _again(module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(0, 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.table
        for block in self.blocks:
            x = x + F.gelu(block(x))
        x = self.normed(x) @ self.truncated * self.one
        x = x + (x @ self.raw.T @ self.raw) + (x @ self.rejected.T @ self.rejected)
        return self.head(x)


def _floats(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator)


def _tokens(vocabulary: int, *shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(vocabulary, shape, generator=generator)


#: Name to how the model is made and how a batch of four samples is.
ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Tensor]]] = {
    "gpt": (lambda: GPT(GPTConfig(num_layers=3, num_heads=2, dim=36, context=16)), _tokens(256, 4, 16)),
    "transformer": (Encoder, _floats(4, 5, 18)),
    "convnet": (ConvNet, _floats(4, 3, 12, 12)),
    "lstm": (Recurrent, _floats(4, 6, 9)),
    "everything": (Everything, _tokens(101, 4, 7)),
}
