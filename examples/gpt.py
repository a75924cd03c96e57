"""A small GPT that reads and writes bytes: a plain `nn.Module` that knows nothing of nucleate.

It has on purpose what makes initialization hard for a framework: an embedding tied to the output head, a
buffer that no checkpoint holds (`persistent=False`), and weights drawn by the model's own rule, some of
them twice. `nucleate` needs no change to it, and no `reset_parameters`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a model."""

    num_layers: int
    num_heads: int
    dim: int
    context: int = 128  # the longest sequence, in bytes
    vocab_size: int = 256  # every byte is a token


#: Named sizes; the number of parameters is that of the vocabulary of 256 bytes.
SIZES = {
    "tiny": GPTConfig(num_layers=2, num_heads=2, dim=32, context=64),  # 33 thousand, for tests
    "small": GPTConfig(num_layers=2, num_heads=4, dim=128, context=64),  # 0.4 million
    "10m": GPTConfig(num_layers=6, num_heads=6, dim=384),  # 10.7 million
    "85m": GPTConfig(num_layers=12, num_heads=12, dim=768, context=256),  # 85 million, as GPT-2's layers
}


class Attention(nn.Module):
    """Causal self-attention whose queries and keys are turned by their position (RoPE)."""

    cos: Tensor  # (context, head_dim / 2)
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        # fp32 by name: precision "bf16-true" makes bf16 the default, in which positions above 256 are rounded.
        # The runtime casts parameters only; a buffer stays what the model made it.
        head_dim = config.dim // config.num_heads
        frequency = 10_000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angle = torch.outer(torch.arange(config.context, dtype=torch.float32), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, dim) -> the same
        batch, time, dim = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out(x.transpose(1, 2).reshape(batch, time, dim))

    def rotate(self, x: Tensor) -> Tensor:  # (batch, head, time, head_dim) -> the same
        cos, sin = self.cos[: x.size(-2)], self.sin[: x.size(-2)]
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1).type_as(x)


class Block(nn.Module):
    """One layer: attention, then a perceptron, each added to what came in."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, bias=False)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, bias=False)
        self.up = nn.Linear(config.dim, 4 * config.dim, bias=False)
        self.down = nn.Linear(4 * config.dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes in, the logits of the next byte out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim, bias=False)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.head.weight = self.embed.weight  # tied: one tensor reads bytes and writes them

        self.apply(self.init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):  # GPT-2: residual branches start small
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.num_layers))

    @staticmethod
    def init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, time) -> (batch, time, vocab)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
