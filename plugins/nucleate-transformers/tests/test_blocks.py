"""The units of FSDP are the modules that a model says it must not be split in."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from nucleate.dimensions.sharding.wrap_policy import find_units
from nucleate_transformers import TransformersIntegration


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("llama", ["model.layers.0", "model.layers.1"]),
        ("llama-tied", ["model.layers.0", "model.layers.1"]),
        ("gpt2", ["transformer.h.0", "transformer.h.1"]),
        ("t5", [f"{side}.block.{index}" for side in ("decoder", "encoder") for index in (0, 1)]),
    ],
)
def test_units_are_what_a_model_names(name: str, units: list[str]) -> None:
    with torch.device("meta"):
        model = tiny.CLASSES[name](tiny.config_of(name))
    TransformersIntegration().setup(model)
    assert sorted(found for found, _ in find_units(model, "auto")) == units


def test_models_inside_of_a_model_count_as_well() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = tiny.CLASSES["distilbert"](tiny.config_of("distilbert"))
            self.decoder = tiny.CLASSES["llama"](tiny.config_of("llama"))
            self.tail = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = Mine()
    TransformersIntegration().setup(model)
    assert {found for found, _ in find_units(model, "auto")} == {
        "encoder.transformer.layer.0", "encoder.transformer.layer.1", "decoder.model.layers.0",
        "decoder.model.layers.1", "tail.0", "tail.1",
    }  # fmt: skip
