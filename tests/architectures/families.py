"""The families, each imported only when it is asked for: their packages take seconds."""

from __future__ import annotations

import importlib
import os

from tests.architectures.case import Family
from tests.architectures.stand_ins import make_torchvision_importable

FAMILIES = {
    "torch": ("tests.architectures.torch_family", "TorchFamily"),
    "transformers": ("tests.architectures.transformers_family", "TransformersFamily"),
    "timm": ("tests.architectures.timm_family", "TimmFamily"),
    "diffusers": ("tests.architectures.diffusers_family", "DiffusersFamily"),
}


def family(name: str) -> Family:
    """Return the family of that name."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    make_torchvision_importable()
    module, cls = FAMILIES[name]
    made: Family = getattr(importlib.import_module(module), cls)()
    return made
