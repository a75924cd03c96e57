"""A LLaMA that generates with a key-value cache: a plain `nn.Module` that knows nothing of nucleate.

Its parameters have the names that Hugging Face's checkpoints of LLaMA have, so that these can be loaded as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
    "tiny": LlamaConfig(2, 4, 2, dim=128, hidden_dim=384, vocab_size=256),  # 0.5 million parameters, a word is a byte
    "200M": LlamaConfig(12, 16, 16, dim=1024, hidden_dim=2816),  # 220 million
    "1B": LlamaConfig(22, 32, 4, dim=2048, hidden_dim=5632),  # 1.1 billion, as TinyLlama
    "7B": LlamaConfig(32, 32, 32, dim=4096, hidden_dim=11008),  # 6.7 billion, as Llama 2
}


def hugging_face_config(config: LlamaConfig) -> dict[str, Any]:
    """Return what a `config.json` holds for transformers to make the same model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
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

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None, layer: int, cache: Cache | None) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=cache is None, enable_gqa=True)
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

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None, layer: int, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, layer, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Tokens in, what the head makes logits of out."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.head_dim = config.head_dim

    def forward(self, tokens: Tensor, cache: Cache | None) -> Tensor:
        x = self.embed_tokens(tokens)
        start = cache.length if cache is not None else 0
        places = torch.arange(start + tokens.size(1), device=tokens.device)
        new = places[start:]
        angles = rope_angles(new, self.head_dim)
        # A single new token may look at all that came before; without a cache attention is causal by itself.
        mask = None if cache is None or len(new) == 1 else new[:, None] >= places
        for number, layer in enumerate(self.layers):
            x = layer(x, angles, mask, number, cache)
        if cache is not None:
            cache.length = len(places)
        return self.norm(x)


class Llama(nn.Module):
    """Tokens `(batch, time)` in; out come the logits `(batch, time, vocab)` of the token that follows each one."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.apply(init_weights)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        return self.lm_head(self.model(tokens, cache))


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
        tokens = model(tokens, cache)[:, -1:].argmax(-1)
        yield tokens
