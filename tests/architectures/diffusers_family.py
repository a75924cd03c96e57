"""Every model class of diffusers, with the defaults of its constructor made small."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import pkgutil
from typing import Any

import diffusers
import diffusers.models
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from tests.architectures.case import Case, Family
from tests.architectures.shrinking import small

diffusers.logging.set_verbosity(diffusers.logging.CRITICAL)

#: What constructors without a working default are given.
OVERRIDES: dict[str, dict[str, Any]] = {
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 8, "block_out_channels": (32, 64),
        "layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 16,
    },
    "ControlNetUnionModel": {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32},
    "DreamLiteTransformer2DModel": {"in_channels": 32},
    "EasyAnimateTransformer3DModel": {"in_channels": 4, "out_channels": 4, "patch_size": 2},
    "AutoencoderKLKVAE": {"channels": 32},
    "AutoencoderKLKVAEVideo": {"ch": 32},
    "AutoencoderVidTok": {"ch": 32, "codebook_size": 64},
    "ConsistencyDecoderVAE": {
        "encoder_block_out_channels": (32, 32, 64, 64), "decoder_block_out_channels": (32, 32, 64, 64),
    },
    "Cosmos3AVAEAudioTokenizer": {"dec_dim": 32, "enc_dim": 32, "enc_intermediate_dim": 64, "enc_num_layers": 2},
    "Kandinsky3UNet": {
        "block_out_channels": (32, 64, 64, 128), "time_embedding_dim": 64, "cross_attention_dim": 64,
        "encoder_hid_dim": 64, "attention_head_dim": 16, "layers_per_block": 1,
    },
    "Kandinsky6SRVAE": {
        "encoder_block_out_channels": (16, 32, 32, 64, 64), "decoder_block_out_channels": (16, 32, 32, 64, 64),
        "layers_per_block": 1,
    },
    "Kandinsky6Transformer3DModel": {
        "model_dim": 64, "ff_dim": 64, "time_dim": 32, "in_text_dim": 32, "in_text_dim2": 32, "axes_dims": (4, 6, 6),
        "num_text_blocks": 1, "num_visual_blocks": 2,
    },
    "LongCatAudioDiTTransformer": {"dit_dim": 64, "dit_depth": 2, "dit_heads": 4, "dit_text_dim": 64},
    "PRXTransformer2DModel": {
        "hidden_size": 64, "num_heads": 4, "depth": 2, "axes_dim": [8, 8], "context_in_dim": 32,
    },
    "RFD4ProteinaTransformer": {"nlayers": 2, "token_dim": 64, "nheads": 4, "pair_repr_dim": 32, "tri_mult_c": 16},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "axes_dims_rope": (4, 6, 6), "max_resolution": (16, 16),
        "caption_channels": [32, 32], "llama_layers": [0, 1, 2],
    },
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2, "sample_size": 16},
    "HunyuanDiT2DControlNetModel": {"in_channels": 4, "patch_size": 2, "sample_size": 16, "transformer_num_layers": 2},
    "LatteTransformer3DModel": {
        "in_channels": 4, "patch_size": 2, "sample_size": 16, "caption_channels": 32, "cross_attention_dim": 64,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 2, "in_channels": 4},
    "OmniGenTransformer2DModel": {
        "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "type": "su"},
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "num_layers": 2,
    },
    "RFD4ProteinaAutoencoder": {
        "atom37_mask": [[1] * 37] * 21, "allowed_residue_types": list(range(20)), "nlayers": 2, "token_dim": 64,
        "nheads": 4, "pair_repr_dim": 32,
    },
    "Transformer2DModel": {"in_channels": 32},
    "TransformerTemporalModel": {"in_channels": 32},
    "ZImageTransformer2DModel": {
        "dim": 64, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [4, 6, 6], "n_layers": 2, "cap_feat_dim": 32,
    },
    "ZImageControlNetModel": {
        "control_layers_places": [0], "control_refiner_layers_places": [0], "control_in_dim": 8,
        "dim": 64, "n_heads": 4, "n_kv_heads": 4,
    },
}  # fmt: skip

#: Classes that hold others: how to make one.
_HOLDING = {
    "FluxMultiControlNetModel": "FluxControlNetModel",
    "HunyuanDiT2DMultiControlNetModel": "HunyuanDiT2DControlNetModel",
    "MultiControlNetModel": "ControlNetModel",
    "MultiControlNetUnionModel": "ControlNetUnionModel",
    "QwenImageMultiControlNetModel": "QwenImageControlNetModel",
    "SD3MultiControlNetModel": "SD3ControlNetModel",
    "MultiAdapter": "T2IAdapter",
}


class DiffusersFamily(Family):
    """All subclasses of `ModelMixin`."""

    def names(self) -> list[str]:
        return sorted(_classes())

    def case(self, name: str) -> Case:
        cls = _classes()[name]
        if name in _HOLDING:
            held = self.case(_HOLDING[name])
            return Case(lambda: cls([held.make(), held.make()]), held.note)
        config, how = small(_defaults(cls), functools.partial(_num_parameters, cls))
        return Case(lambda: cls(**copy.deepcopy(config)), {"how": how})


def _defaults(cls: type) -> dict[str, Any]:
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {**found, **OVERRIDES.get(cls.__name__, {})}


def _num_parameters(cls: type[nn.Module], config: dict[str, Any]) -> int:
    try:
        with torch.device("meta"):
            model = cls(**copy.deepcopy(config))
    except Exception as error:
        if "meta" not in str(error).lower():
            raise
        model = cls(**copy.deepcopy(config))
    return sum(parameter.numel() for parameter in model.parameters())


@functools.cache
def _classes() -> dict[str, type[nn.Module]]:
    for info in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        importlib.import_module(info.name)

    def below(cls: type) -> list[type]:
        return [found for sub in cls.__subclasses__() for found in (sub, *below(sub))]

    return {cls.__name__: cls for cls in below(ModelMixin) if not cls.__name__.startswith("Legacy")}
