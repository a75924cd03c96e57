"""A LLaMA that generates with a key-value cache: a plain `nn.Module` that knows nothing of nucleate.

Its parameters have the names that Hugging Face's checkpoints of LLaMA have, so that these can be loaded as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a model."""

    num_layers: int
    num_heads: int
    num_kv_heads: int  # each is shared by several heads of queries (grouped-query attention)
    dim: int
    hidden_dim: int
    vocab_size: int = 32_000

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


#: Named sizes.
SIZES = {
    "tiny": LlamaConfig(2, 4, 2, dim=128, hidden_dim=256, vocab_size=512),  # 0.4 million parameters, for tests
    "1B": LlamaConfig(22, 32, 4, dim=2048, hidden_dim=5632),  # 1.1 billion, as TinyLlama
    "7B": LlamaConfig(32, 32, 32, dim=4096, hidden_dim=11008),  # 6.7 billion, as Llama 2
}


class Cache:
    """The keys and values of the tokens so far, of every layer.

    Args:
        config: The sizes of the model.
        length: How many tokens there may be.
        device: Where the model is.
        dtype: What its attention computes in.
    """

    def __init__(self, config: LlamaConfig, length: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.num_layers, 1, config.num_kv_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append those of the new tokens, and return all of a layer, `(1, kv_heads, length, head_dim)`."""
        end = self.length + keys.size(2)
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention whose queries and keys are turned by their position (RoPE)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None, layer: int, cache: Cache) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        keys, values = cache.extend(layer, rotate(k, angles), v)
        x = F.scaled_dot_product_attention(rotate(q, angles), keys, values, attn_mask=mask, enable_gqa=True)
        return self.o_proj(x.transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    """Two projections up, of which one is the gate of the other, and one down (SwiGLU)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention, then a perceptron, each added to what came in."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=1e-5)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=1e-5)
        self.mlp = Perceptron(config)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None, layer: int, cache: Cache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, layer, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Tokens in, what the head makes logits of out."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)

    def forward(self, tokens: Tensor, cache: Cache) -> Tensor:
        x = self.embed_tokens(tokens)
        end = cache.length + tokens.size(1)
        places = torch.arange(end, device=tokens.device)
        new = places[cache.length :]
        angles = rope_angles(new, cache.keys.size(-1))
        # A single new token may look at all that came before.
        mask = None if len(new) == 1 else new[:, None] >= places
        for number, layer in enumerate(self.layers):
            x = layer(x, angles, mask, number, cache)
        cache.length = end
        return self.norm(x)


class Llama(nn.Module):
    """Tokens `(1, time)` in, the logits `(1, vocab)` of the token that follows the last one out."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.apply(init_weights)

    def forward(self, tokens: Tensor, cache: Cache) -> Tensor:
        return self.lm_head(self.model(tokens, cache)[:, -1])


def init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)


def rope_angles(places: Tensor, head_dim: int) -> Tensor:  # (time,) -> (time, head_dim / 2)
    # Made for each step and not kept in a buffer: `model.to(torch.bfloat16)` would round positions above 256.
    frequency = 10_000.0 ** -(torch.arange(0, head_dim, 2, device=places.device, dtype=torch.float32) / head_dim)
    return torch.outer(places.float(), frequency)


def rotate(x: Tensor, angles: Tensor) -> Tensor:  # (1, heads, time, head_dim) -> the same
    cos, sin = angles.cos(), angles.sin()
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1).type_as(x)


@torch.inference_mode()
def generate(model: nn.Module, prompt: Tensor, cache: Cache) -> Iterator[Tensor]:
    """Yield the most likely token `(1, 1)` after `prompt` `(1, time)`, the one after that, and so on, for ever."""
    tokens = prompt
    while True:
        tokens = model(tokens, cache).argmax(-1, keepdim=True)
        yield tokens
