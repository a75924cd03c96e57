"""Tiny models with the features that plugins break most easily: ties, odd sizes, buffers, custom inits.

Each model runs a forward in milliseconds, is deterministic for a given input, and makes its own sample input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TinyModel(nn.Module, ABC):
    """A tiny model that makes its own sample input."""

    #: Whether each sample's output depends only on that sample; False for models with batch statistics.
    per_sample: bool = True

    @abstractmethod
    def sample(self, batch_size: int = 4, seed: int = 0) -> Tensor:
        """Return an input of `batch_size` samples. The `seed` alone decides the input; no global generator is used."""

    @staticmethod
    def loss(output: Tensor) -> Tensor:
        """Return a scalar for backward: the mean of squares, which is also the mean over equal parts of a batch."""
        return output.float().square().mean()


class TinyTransformer(TinyModel):
    """A model with two blocks, tied embedding and head, a rotary table as non-persistent buffer, and a custom init."""

    def __init__(self, vocabulary: int = 37, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        # Explicitly float32: this table must not be rounded to the precision of the parameters.
        table = 1.0 / 10_000 ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        self.register_buffer("inv_freq", table, persistent=False)
        self.inv_freq: Tensor
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `(batch, length)` to logits `(batch, length, vocabulary)`."""
        hidden = self.embedding(tokens)
        angles = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * self.inv_freq
        position = torch.cat((angles.cos(), angles.sin()), dim=-1).to(hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden * position)
        logits: Tensor = self.head(self.norm(hidden))
        return logits

    def sample(self, batch_size: int = 4, seed: int = 0) -> Tensor:
        """Return tokens `(batch_size, 9)`."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.head.out_features, (batch_size, 9), generator=generator)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.down(F.gelu(self.up(self.norm(hidden))))
        return out


class TinyConvNet(TinyModel):
    """A model with convolutions and batch norm: running statistics, an integer buffer, a frozen layer."""

    per_sample = False

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False).requires_grad_(False)
        self.norm = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 5, 3, stride=2)
        self.head = nn.Linear(5, 7)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(batch, 3, height, width)` to `(batch, 7)`."""
        hidden = F.relu(self.conv(F.relu(self.norm(self.stem(images)))))
        output: Tensor = self.head(hidden.mean(dim=(2, 3)))
        return output

    def sample(self, batch_size: int = 4, seed: int = 0) -> Tensor:
        """Return images `(batch_size, 3, 8, 8)`."""
        return torch.randn(batch_size, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


class TinyRecurrent(TinyModel):
    """A model with an LSTM, which also holds its own weights by weak references."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, num_layers=2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, sequences: Tensor) -> Tensor:
        """Map sequences `(batch, length, 5)` to `(batch, 3)`."""
        hidden, _ = self.lstm(sequences)
        output: Tensor = self.head(hidden[:, -1])
        return output

    def sample(self, batch_size: int = 4, seed: int = 0) -> Tensor:
        """Return sequences `(batch_size, 4, 5)`."""
        return torch.randn(batch_size, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


class TinyOdd(TinyModel):
    """A model with raw parameters, sizes that no number of ranks divides, and initializers that are hard to repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.5))
        self.bias = nn.Parameter(torch.randn(7) * 0.1)
        self.inner = nn.Linear(11, 13)
        self.outer = nn.Linear(13, 7, bias=False)
        nn.init.trunc_normal_(self.inner.weight, std=0.2)
        with torch.no_grad():
            # In float32, because torch has no QR for half dtypes.
            self.outer.weight.copy_(nn.init.orthogonal_(torch.empty(7, 13, dtype=torch.float32)))
            self.inner.bias[:5].zero_()
        self.register_buffer("offsets", torch.linspace(-1, 1, 11, dtype=torch.float32))
        self.offsets: Tensor

    def forward(self, features: Tensor) -> Tensor:
        """Map features `(batch, 11)` to `(batch, 7)`."""
        hidden = torch.tanh(self.inner(features + self.offsets.to(features.dtype)))
        output: Tensor = self.outer(hidden) * self.scale + self.bias
        return output

    def sample(self, batch_size: int = 4, seed: int = 0) -> Tensor:
        """Return features `(batch_size, 11)`."""
        return torch.randn(batch_size, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


class TinyGPT(TinyModel):
    """A causal transformer for strategies with a plan: all its matrices can be split over 2 or 4 ranks.

    It has a fused weight for query, key and value, a norm of each head, tied embedding and head, a frozen weight and a
    scalar. Its sizes are multiples of 4.

    Args:
        dropout: The probability of dropout.
    """

    #: The style of each module, for `nucleate.dimensions.TensorParallel`.
    plan: ClassVar[dict[str, str]] = {
        "embedding": "rowwise",
        "blocks.*.qkv": "fused_3",
        "blocks.*.head_norm": "replicated",
        "blocks.*.out": "rowwise",
        "blocks.*.up": "colwise",
        "blocks.*.down": "rowwise",
        "head": "colwise_gathered",
    }
    vocabulary: ClassVar[int] = 48
    width: ClassVar[int] = 16

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(self.vocabulary, self.width)
        self.blocks = nn.ModuleList(_AttentionBlock(self.width, dropout) for _ in range(2))
        self.norm = nn.LayerNorm(self.width)
        self.head = nn.Linear(self.width, self.vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("offset", torch.randn(self.vocabulary))
        self.offset: Tensor
        self.apply(self._init)
        self.blocks[0].get_submodule("up").requires_grad_(False)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `(batch, length)` to logits `(batch, length, vocabulary)`."""
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden)) * self.scale + self.offset
        return logits

    def sample(self, batch_size: int = 4, seed: int = 0) -> Tensor:
        """Return tokens `(batch_size, 8)`."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.vocabulary, (batch_size, 8), generator=generator)


class _AttentionBlock(nn.Module):
    def __init__(self, width: int, dropout: float, num_heads: int = 4) -> None:
        super().__init__()
        self.head_width = width // num_heads
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head_norm = nn.LayerNorm(self.head_width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        rows, length, _ = hidden.shape
        # A rank may have some of the heads, so their number follows from the output.
        parts = self.qkv(self.first_norm(hidden)).chunk(3, -1)
        query, key, value = (part.reshape(rows, length, -1, self.head_width) for part in parts)
        query, key, value = (part.transpose(1, 2) for part in (self.head_norm(query), self.head_norm(key), value))
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        seen = seen.transpose(1, 2).reshape(rows, length, -1)
        hidden = hidden + self.dropout(self.out(seen))
        out: Tensor = hidden + self.dropout(self.down(F.gelu(self.up(self.second_norm(hidden)))))
        return out


#: The tiny models that the suites run by default. `TinyGPT` is for strategies and dimensions with a plan.
MODELS: tuple[type[TinyModel], ...] = (TinyTransformer, TinyConvNet, TinyRecurrent, TinyOdd)
