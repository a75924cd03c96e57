"""Models of many architectures, each small, and what goes into them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 96,
    "max_position_embeddings": 64,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip

#: The token in whose place llava puts an image.
IMAGE_TOKEN = 5


def config_of(name: str) -> Any:
    match name:
        case "llama":
            return hf.LlamaConfig(**SIZES, num_key_value_heads=2)
        case "llama-tied":
            return hf.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
        case "mixtral":
            return hf.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
        case "qwen2-moe":
            return hf.Qwen2MoeConfig(
                **SIZES, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                shared_expert_intermediate_size=24, decoder_sparse_step=1,
            )  # fmt: skip
        case "deepseek-v3":
            return hf.DeepseekV3Config(
                **SIZES, num_key_value_heads=4, n_routed_experts=4, moe_intermediate_size=24, first_k_dense_replace=1,
                n_group=1, topk_group=1, num_experts_per_tok=2, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
                qk_nope_head_dim=8, v_head_dim=8,
            )  # fmt: skip
        case "gpt-neox":
            return hf.GPTNeoXConfig(**SIZES)
        case "phi3":
            return hf.Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        case "qwen3":
            return hf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)
        case "llava":
            return hf.LlavaConfig(
                vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**SIZES, num_key_value_heads=2),
                image_token_index=IMAGE_TOKEN, vision_feature_layer=-1,
            )  # fmt: skip
        case "gemma2":
            return hf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8)
        case "bert" | "bert-classifier":
            return hf.BertConfig(**SIZES, num_labels=3)
        case "distilbert":
            return hf.DistilBertConfig(
                dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=96, max_position_embeddings=64
            )
        case "gpt2":
            return hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
        case "t5":
            return hf.T5Config(
                d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=96, decoder_start_token_id=0
            )
        case "bart":
            return hf.BartConfig(
                d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=96, max_position_embeddings=64, bos_token_id=0,
                eos_token_id=2, pad_token_id=1, decoder_start_token_id=2, forced_eos_token_id=2,
            )  # fmt: skip
        case "vit":
            return hf.ViTConfig(**VISION, num_labels=5)
        case "clip":
            text = {**SIZES, "bos_token_id": 0, "eos_token_id": 2}
            return hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
        case "mamba":
            return hf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8)
    raise AssertionError(name)


CLASSES: dict[str, type[PreTrainedModel]] = {
    "llama": hf.LlamaForCausalLM,
    "llama-tied": hf.LlamaForCausalLM,
    "mixtral": hf.MixtralForCausalLM,
    "qwen2-moe": hf.Qwen2MoeForCausalLM,
    "deepseek-v3": hf.DeepseekV3ForCausalLM,
    "gemma2": hf.Gemma2ForCausalLM,
    "bert": hf.BertForMaskedLM,
    "bert-classifier": hf.BertForSequenceClassification,
    "distilbert": hf.DistilBertModel,
    "gpt2": hf.GPT2LMHeadModel,
    "t5": hf.T5ForConditionalGeneration,
    "bart": hf.BartForConditionalGeneration,
    "vit": hf.ViTForImageClassification,
    "clip": hf.CLIPModel,
    "mamba": hf.MambaForCausalLM,
}
#: Further models with a plan of tensor parallel.
PLANNED: dict[str, type[PreTrainedModel]] = {
    "gpt-neox": hf.GPTNeoXForCausalLM,
    "phi3": hf.Phi3ForCausalLM,
    "qwen3": hf.Qwen3ForCausalLM,
    "llava": hf.LlavaForConditionalGeneration,
}


def construct(name: str) -> Any:
    return {**CLASSES, **PLANNED}[name](config_of(name))


def save(name: str, path: Path, **options: Any) -> None:
    """Write a model with numbers everywhere, also where its initialization has none."""
    torch.manual_seed(0)
    model = construct(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(path, **options)


def inputs_of(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 90, (2, 9), generator=generator)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    if name == "vit":
        return {"pixel_values": pixels}
    if name == "clip":
        return {"input_ids": tokens, "pixel_values": pixels}
    if name in ("t5", "bart"):
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :4]}
    return {"input_ids": tokens}


@torch.no_grad()
def outputs_of(model: nn.Module, name: str) -> Tensor:
    found = model(**inputs_of(name))
    for key in ("logits", "logits_per_image", "last_hidden_state"):
        if found.get(key) is not None:
            output: Tensor = found[key]
            return output
    raise AssertionError(list(found))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    """Compare every parameter and buffer by name, dtype, bits and ties; and what else a loaded model has."""
    for kind in ("named_parameters", "named_buffers"):
        mine = dict(getattr(model, kind)(remove_duplicate=False))
        theirs = dict(getattr(expected, kind)(remove_duplicate=False))
        assert list(mine) == list(theirs)
        for name, tensor in theirs.items():
            assert mine[name].dtype == tensor.dtype, name
            assert torch.equal(whole(mine[name]), tensor), name
            assert mine[name].requires_grad == tensor.requires_grad, name
        assert _ties(mine) == _ties(theirs)
    assert list(model.state_dict()) == list(expected.state_dict())
    assert model.training == expected.training
    inner: Any = getattr(model, "module", model)
    assert {**inner.config.to_dict(), "_name_or_path": ""} == {**expected.config.to_dict(), "_name_or_path": ""}
    if inner.can_generate():
        assert inner.generation_config.to_dict() == expected.generation_config.to_dict()


def _ties(tensors: dict[str, Tensor]) -> list[tuple[str, str]]:
    return [(one, other) for one, other in itertools.combinations(tensors, 2) if tensors[one] is tensors[other]]
