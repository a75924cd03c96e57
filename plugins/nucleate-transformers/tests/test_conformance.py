"""The integration keeps the contract."""

from __future__ import annotations

from pathlib import Path

import tiny
import transformers as hf
from torch import nn

from nucleate import Integration
from nucleate.testing import IntegrationSuite
from nucleate_transformers import TransformersIntegration


class TestTransformers(IntegrationSuite):
    loads = True

    def make_integration(self) -> Integration:
        return TransformersIntegration()

    def construct(self) -> nn.Module:
        model: nn.Module = hf.AutoModelForCausalLM.from_config(tiny.config_of("mixtral"))
        return model

    def store(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, hf.PreTrainedModel)
        model.save_pretrained(folder)

    def load(self, folder: Path) -> nn.Module:
        model: nn.Module = hf.AutoModelForCausalLM.from_pretrained(folder)
        return model
