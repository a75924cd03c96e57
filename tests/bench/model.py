"""The models that are measured, in sizes from a thousand to a billion parameters.

Two are a decoder of plain torch modules in which nothing is hard for the peers: no ties, no buffers, and every module
with parameters has a `reset_parameters`. `plain` leaves the initialization to torch's modules, `again` draws all
weights a second time at the end of the constructor, as GPT-2, nanoGPT and transformers do. `llama` is transformers'
own `LlamaForCausalLM`, untied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INITS = ("plain", "again", "llama")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """The sizes of a model, and of the batches that train it."""

    num_layers: int
    num_heads: int
    dim: int
    vocab_size: int = 256
    batch_size: int = 8
    context: int = 128


SIZES = {
    "micro": Size(num_layers=1, num_heads=2, dim=32, vocab_size=64, batch_size=1, context=16),  # 0.02 million
    "1m": Size(num_layers=4, num_heads=4, dim=128),  # 0.9 million
    "10m": Size(num_layers=6, num_heads=6, dim=384),  # 10.8 million
    "100m": Size(num_layers=12, num_heads=10, dim=640, vocab_size=32_000),  # 100 million
    "1b": Size(num_layers=18, num_heads=16, dim=2048, vocab_size=32_000),  # 1.04 billion
}


class Block(nn.Module):
    """Causal attention, then a perceptron, each added to what came in."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.num_heads = size.num_heads
        self.norm1 = nn.LayerNorm(size.dim)
        self.qkv = nn.Linear(size.dim, 3 * size.dim)
        self.out = nn.Linear(size.dim, size.dim)
        self.norm2 = nn.LayerNorm(size.dim)
        self.up = nn.Linear(size.dim, 4 * size.dim)
        self.down = nn.Linear(4 * size.dim, size.dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, time, dim))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Decoder(nn.Module):
    """Tokens in, the logits of the next token out."""

    def __init__(self, size: Size, init: str = "plain") -> None:
        super().__init__()
        self.embed = nn.Embedding(size.vocab_size, size.dim)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.num_layers))
        self.norm = nn.LayerNorm(size.dim)
        self.head = nn.Linear(size.dim, size.vocab_size, bias=False)
        if init == "again":
            self.apply(_init_again)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make parameters of a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_model(size: Size, init: str) -> nn.Module:
    """Construct the model that `init` names."""
    if init != "llama":
        return Decoder(size, init)
    from transformers import LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(llama_config(size))
    return model


def llama_config(size: Size) -> Any:
    """Return the configuration of a Llama of about that size."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.dim,
        intermediate_size=43 * size.dim // 16,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        tie_word_embeddings=False,
    )


def blocks_of(model: Any) -> Any:
    """Return the repeated blocks."""
    return model.blocks if isinstance(model, Decoder) else model.model.layers


def reset(model: Any) -> None:
    """Initialize a model after `to_empty`, the way its library offers."""
    if not isinstance(model, Decoder):
        model.init_weights()
        return
    for module in model.modules():
        if callable(reset_parameters := getattr(module, "reset_parameters", None)):
            reset_parameters()


def num_parameters(size: Size) -> int:
    """Return how many parameters a model of that size has, without making it."""
    block = 12 * size.dim**2 + 13 * size.dim
    return size.num_layers * block + 2 * size.vocab_size * size.dim + 2 * size.dim


def _init_again(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
