"""Every architecture of transformers: the base class of each configuration, and the classes with heads."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from tests.architectures.case import Case, Family, NotBuildable
from tests.architectures.families import NAMED
from tests.architectures.shrinking import small

transformers.logging.set_verbosity(transformers.logging.CRITICAL)


class TransformersFamily(Family):
    """All model classes of transformers' `Auto` mappings, and a few by name."""

    def names(self) -> list[str]:
        return list(_classes())

    def case(self, name: str) -> Case:
        model_type, config_name, model_name = _classes()[name]
        config_class, model_class = _load(model_type, config_name), _load(model_type, model_name)
        num_parameters = functools.partial(_num_parameters, model_class)
        # Where the mapping names the configuration of the whole, the class knows that of its part.
        candidates = [config_class, *{getattr(model_class, "config_class", None)} - {config_class, None}]
        errors = []
        for candidate in candidates:
            try:
                overrides = {**OVERRIDES.get(candidate.__name__, {}), **OVERRIDES.get(model_name, {})}
                config, how = small(_default(candidate, overrides), num_parameters)
                return Case(lambda config=config: model_class(copy.deepcopy(config)), {"how": how})
            except NotBuildable as error:
                errors.append(f"{candidate.__name__}: {error}")
        raise NotBuildable("; ".join(errors))


class DefaultSizeFamily(Family):
    """The models of transformers that `NAMED` lists, each as its configuration's defaults make it: up to 4.9 GB."""

    def names(self) -> list[str]:
        return list(NAMED["transformers"])

    def case(self, name: str) -> Case:
        model_type, config_name, model_name = _classes()[name]
        config, model_class = _default(_load(model_type, config_name), {}), _load(model_type, model_name)
        return Case(lambda: model_class(copy.deepcopy(config)), {"how": "as it is"})


#: Classes that no mapping names.
BY_NAME = {
    "Wav2Vec2ForPreTraining": "wav2vec2",
    "Blip2Model": "blip-2",
    "Blip2ForConditionalGeneration": "blip-2",
}


_TIMM_ENCODER = {
    "model_type": "timm_wrapper",
    "architecture": "vit_pe_core_tiny_patch16_384",
    "do_pooling": True,
    "num_classes": 1024,
    "global_pool": "map",
}
_SPARSE_INDEX = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 2, "ngram_vocab_size_base": 64, "split_ngram_parts": 2, "ple_embed_dim": 32,
}  # fmt: skip
_ROPE_OF_TWO_KINDS = {
    kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
}
_INTRACLASS = {
    "reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0],
    "vertical_long_to_small_conv_longratio": [[7, 1], [1, 1], [3, 0]],
    "vertical_long_to_small_conv_midratio": [[5, 1], [1, 1], [2, 0]],
    "vertical_long_to_small_conv_shortratio": [[3, 1], [1, 1], [1, 0]],
    "horizontal_small_to_long_conv_longratio": [[1, 7], [1, 1], [0, 3]],
    "horizontal_small_to_long_conv_midratio": [[1, 5], [1, 1], [0, 2]],
    "horizontal_small_to_long_conv_shortratio": [[1, 3], [1, 1], [0, 1]],
    "symmetric_conv_long_longratio": [[7, 7], [1, 1], [3, 3]],
    "symmetric_conv_long_midratio": [[5, 5], [1, 1], [2, 2]],
    "symmetric_conv_long_shortratio": [[3, 3], [1, 1], [1, 1]],
}  # fmt: skip

#: What a configuration needs to be buildable at all, by configuration or by model.
OVERRIDES: dict[str, dict[str, Any]] = {
    "AutoformerConfig": {"prediction_length": 4},
    "InformerConfig": {"prediction_length": 4},
    "TimeSeriesTransformerConfig": {"prediction_length": 4},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "Wav2Vec2BertForCTC": {"vocab_size": 32},
    "Wav2Vec2ConformerForCTC": {"vocab_size": 32},
    "BeitForSemanticSegmentation": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "TimmBackboneConfig": {"backbone": "resnet18"},
    "TimmWrapperConfig": {"architecture": "resnet18"},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 7, "IMGIMGA": 8}},
    "Emu3Config": {"vocabulary_map": {"<image>": 7, "<|extra_200|>": 8}},
    "DiffusionGemmaConfig": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "Granite4VisionConfig": {
        "deepstack_layer_map": [[0, 0], [1, 1]], "spatial_target_layers": [0, 0, 1, 1], "downsample_rate": "4/8",
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 16},
    "DeepseekOcr2Config": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2}},
    "MoonshineStreamingConfig": {"num_key_value_heads": 8, "num_attention_heads": 8},
    "NemotronConfig": {"num_key_value_heads": 8},
    "PerceptionLMConfig": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_tiny_patch16_384",
            "model_args": {"embed_dim": 192},
        },
    },
    "FastVlmConfig": {
        "vision_config": {
            "model_type": "timm_wrapper", "architecture": "fastvit_mci0", "hidden_size": 1024,
            "model_args": {"inference_mode": True},
        },
    },
    "PeVideoConfig": {"video_config": {"vision_config": _TIMM_ENCODER}},
    "PeVideoEncoderConfig": {"vision_config": _TIMM_ENCODER},
    "PeAudioVideoConfig": {"audio_video_config": {"video_config": {"vision_config": _TIMM_ENCODER}}},
    "PeAudioVideoEncoderConfig": {"video_config": {"vision_config": _TIMM_ENCODER}},
    "Qwen4ExpTextConfig": _SPARSE_INDEX,
    "Qwen4ExpConfig": {"text_config": _SPARSE_INDEX},
    "T5Gemma2EncoderConfig": {"text_config": {"dropout_rate": 0.0}},
    "ConvNextConfig": {"hidden_sizes": [8, 16, 16, 32]},
    "ConvNextV2Config": {"hidden_sizes": [8, 16, 16, 32]},
    "VitMatteConfig": {"fusion_hidden_sizes": [32, 16, 16, 8]},
    "FocalNetConfig": {"hidden_sizes": [96, 192, 384, 768]},
    "HieraForPreTraining": {"decoder_hidden_size": 32, "decoder_depth": 2, "decoder_num_heads": 4},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "PerceiverForImageClassificationFourier": {"d_latents": 64, "num_cross_attention_heads": 1},
    "PerceiverForImageClassificationConvProcessing": {"d_latents": 64, "num_cross_attention_heads": 1},
    "CohereCompassTextConfig": {"rope_parameters": _ROPE_OF_TWO_KINDS},
    "CohereCompassConfig": {"text_config": {"rope_parameters": _ROPE_OF_TWO_KINDS}},
    "Gemma3nConfig": {
        "text_config": {
            "num_kv_shared_layers": 0, "num_hidden_layers": 5, "vocab_size_per_layer_input": 512,
            "hidden_size_per_layer_input": 16, "vocab_size": 512,
        },
    },
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1},
    "DbrxConfig": {"attn_config": {"rope_theta": 10000.0}},
    "Qwen3OmniMoeConfig": {
        "talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 32}},
    },
    "PPOCRV5ServerDetConfig": {"intraclass_block_config": _INTRACLASS, "kernel_list": [3, 2, 2]},
    "PPOCRV6MediumDetConfig": {"intraclass_block_config": _INTRACLASS, "kernel_list": [3, 2, 2]},
    "Sapiens2Config": {
        "head_config": {
            "upsample_out_channels": [32], "upsample_kernel_sizes": [4], "conv_out_channels": [16],
            "conv_kernel_sizes": [3], "scale_conv_out_channels": [8], "scale_conv_kernel_sizes": [1],
            "scale_final_input_size": 32, "scale_final_hidden_sizes": [16, 8],
        },
    },
}  # fmt: skip


def _default(config_class: Any, overrides: dict[str, Any]) -> Any:
    try:
        return config_class(**overrides)
    except Exception as error:
        raise NotBuildable(f"{config_class.__name__}(): {type(error).__name__}: {str(error)[:300]}") from error


def _num_parameters(model_class: type[nn.Module], config: Any) -> int:
    try:
        with torch.device("meta"):
            model = model_class(copy.deepcopy(config))
    except Exception as error:
        if "meta" not in str(error).lower():
            raise
        # It looks at values, which it cannot on the meta device.
        model = model_class(copy.deepcopy(config))
    return sum(parameter.numel() for parameter in model.parameters())


@functools.cache
def _classes() -> dict[str, tuple[str, str, str]]:
    """Return model type, configuration class and model class of each case, by name, without importing the models."""
    found: dict[str, tuple[str, str, str]] = {}
    mappings = [name for name in dir(modeling_auto) if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")]
    mappings.sort(key=lambda name: (name != "MODEL_MAPPING_NAMES", name))
    for mapping_name in mappings:
        for model_type, names in getattr(modeling_auto, mapping_name).items():
            config_name = CONFIG_MAPPING_NAMES.get(model_type)
            for name in names if isinstance(names, (list, tuple)) else (names,):
                if name is None or config_name is None:
                    continue
                key = name if found.get(name, (model_type, config_name))[1] == config_name else f"{name}@{config_name}"
                found.setdefault(key, (model_type, config_name, name))
    for name, model_type in BY_NAME.items():
        found.setdefault(name, (model_type, CONFIG_MAPPING_NAMES[model_type], name))
    return found


def _load(model_type: str, name: str) -> Any:
    module = model_type_to_module_name(model_type)
    if hasattr(transformers, name):
        return getattr(transformers, name)
    package = f"transformers.models.{module}"
    for kind in ("modeling", "configuration"):
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(f"{package}.{kind}_{module}"), name)
    raise NotBuildable(f"transformers has no {name} in {package}")
