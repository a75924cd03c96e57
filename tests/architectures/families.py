"""The families, each imported only when it is asked for: their packages take seconds."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass

from tests.architectures.case import Family
from tests.architectures.stand_ins import make_torchaudio_importable, make_torchvision_importable

FAMILIES = {
    "torch": ("tests.architectures.torch_family", "TorchFamily"),
    "transformers": ("tests.architectures.transformers_family", "TransformersFamily"),
    "transformers-default-size": ("tests.architectures.transformers_family", "DefaultSizeFamily"),
    "timm": ("tests.architectures.timm_family", "TimmFamily"),
    "diffusers": ("tests.architectures.diffusers_family", "DiffusersFamily"),
    "torchaudio": ("tests.architectures.torchaudio_family", "TorchaudioFamily"),
    "torchrec": ("tests.architectures.torchrec_family", "TorchrecFamily"),
}

#: Models that are asked for by name: those that ColossalAI's page on lazy initialization lists as not supported, and
#: torchrec's. The default session judges them, but for torchaudio's: PyPI's torchaudio does not load beside the CPU
#: build of torch, and transformers imports it wherever it is installed.
NAMED = {
    "transformers": (
        "ViTModel", "ViTForMaskedImageModeling", "ViTForImageClassification", "Blip2Model",
        "Blip2ForConditionalGeneration",
    ),
    "torchaudio": ("wav2vec2_base", "hubert_base"),
    "torchrec": ("EmbeddingBagCollection", "DLRM", "DeepFM", "SimpleDeepFMNN"),
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a case may take before it counts as crashed.

    Attributes:
        memory_bytes: Of address space. A model that was not made small enough must not take the machine down.
        case_s: Seconds.
    """

    memory_bytes: int = 10 << 30
    case_s: float = 150.0


_LIMITS = {"transformers-default-size": Limits(memory_bytes=18 << 30, case_s=600.0)}


def limits(name: str) -> Limits:
    """Return the limits for the cases of a family, without importing the family."""
    return _LIMITS.get(name, Limits())


def family(name: str) -> Family:
    """Return the family of that name."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    make_torchvision_importable()
    make_torchaudio_importable()
    module, cls = FAMILIES[name]
    made: Family = getattr(importlib.import_module(module), cls)()
    return made
