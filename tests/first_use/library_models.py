"""Usual models of libraries, small. The libraries are imported when a model is asked for."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

Make = Callable[[], nn.Module]


def transformers_models() -> dict[str, Make]:
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        MambaConfig,
        MambaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTModel,
    )

    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    decoder = {**width, "vocab_size": 128, "num_key_value_heads": 2}
    return {
        "Llama": lambda: LlamaForCausalLM(LlamaConfig(**decoder)),
        "Mistral": lambda: MistralForCausalLM(MistralConfig(**decoder)),
        "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4)),
        "BERT": lambda: BertModel(BertConfig(vocab_size=128, **width)),
        "ViT": lambda: ViTModel(ViTConfig(**width)),
        "Mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2)),
        "T5": lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        ),
    }


def diffusers_models() -> dict[str, Make]:
    from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel

    blocks = {"block_out_channels": (32, 32), "norm_num_groups": 8}
    return {
        "UNet": lambda: UNet2DConditionModel(
            **blocks,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
        ),
        "autoencoder": lambda: AutoencoderKL(
            **blocks,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        ),
        "DiT": lambda: DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, num_layers=2),
    }


def timm_models() -> dict[str, Make]:
    import timm

    names = ("vit_tiny_patch16_224", "resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "efficientnet_b0")
    return {name: lambda name=name: timm.create_model(name) for name in names}  # type: ignore[misc]
