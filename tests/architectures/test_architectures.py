"""All of torch.nn, and architectures of transformers that differ in what their constructors do, are exact.

The `zoo` session judges every architecture; this is the part that every change has to pass.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.architectures.case import Case, Family
from tests.architectures.families import family
from tests.architectures.pool import judge_all
from tests.architectures.torch_family import TorchFamily
from tests.architectures.verdict import DIFFERENT, EXACT, HEAP, UNBUILDABLE, judge

TRANSFORMERS = [
    "BertModel", "BigBirdModel", "Blip2ForConditionalGeneration", "Blip2Model", "CLIPModel", "ConvNextModel",
    "DeepseekV3ForCausalLM", "DebertaV2Model", "EncodecModel", "GPT2LMHeadModel", "Gemma3ForConditionalGeneration",
    "HubertModel", "LlamaForCausalLM", "MambaModel", "Mamba2Model", "MixtralForCausalLM", "RecurrentGemmaModel",
    "RwkvModel", "SwinModel", "T5ForConditionalGeneration", "VitsModel", "ViTForImageClassification",
    "ViTForMaskedImageModeling", "ViTModel", "Wav2Vec2ForCTC", "Wav2Vec2ForPreTraining", "Wav2Vec2Model",
    "WhisperForConditionalGeneration", "XLNetModel", "JambaModel",
]  # fmt: skip

# What torch itself warns of when these classes are made.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`(nn.Container|NLLLoss2d)` (is|has been) deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but:UserWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
]


@pytest.mark.parametrize("name", TorchFamily().names())
def test_every_module_class_of_torch_nn_is_exact(name: str) -> None:
    verdict = judge(TorchFamily(), name)
    assert verdict.outcome == EXACT, verdict.details


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_an_architecture_of_transformers_is_exact(name: str) -> None:
    verdict = judge(family("transformers"), name)
    assert verdict.outcome == EXACT, verdict.details
    assert not any(is_parameter for *_, is_parameter in verdict.early), verdict.early


class _Odd(Family):
    """Cases that must not pass."""

    def names(self) -> list[str]:
        return ["different each time", "draws more each time", "unwritten", "broken", "steered"]

    def case(self, name: str) -> Case:
        self.calls = 0
        return Case({
            "different each time": self._different, "draws more each time": self._draws,
            "unwritten": self._unwritten, "broken": self._broken, "steered": self._steered,
        }[name])  # fmt: skip

    def _different(self) -> nn.Module:
        self.calls += 1
        module = nn.Linear(2, 2)
        module.cache = {"made": [torch.tensor(self.calls)]}
        return module

    def _draws(self) -> nn.Module:
        self.calls += 1
        torch.rand(self.calls)
        return nn.Identity()

    def _unwritten(self) -> nn.Module:
        module = nn.Linear(2, 2)
        module.extra = nn.Parameter(torch.empty(3))
        return module

    def _broken(self) -> nn.Module:
        raise ValueError("a reason")

    def _steered(self) -> nn.Module:
        module = nn.Linear(2, 2)
        if module.weight.sum() > 0:
            module.scale = 2
        return module


def test_what_differs_is_found_in_a_collection_too() -> None:
    verdict = judge(_Odd(), "different each time")
    assert verdict.outcome == DIFFERENT
    assert verdict.details == ["cache['made'][0]: other values"]


def test_a_stream_that_ends_elsewhere_is_found() -> None:
    verdict = judge(_Odd(), "draws more each time")
    assert verdict.outcome == DIFFERENT
    assert "random stream" in verdict.details[0]


def test_memory_that_eager_construction_leaves_unwritten_is_an_outcome_of_its_own() -> None:
    verdict = judge(_Odd(), "unwritten")
    assert (verdict.outcome, verdict.details) == (HEAP, ["extra"])


def test_a_constructor_that_fails_is_not_buildable_and_says_why() -> None:
    verdict = judge(_Odd(), "broken")
    assert (verdict.outcome, verdict.details) == (UNBUILDABLE, ["ValueError: a reason"])


def test_a_parameter_that_steers_its_constructor_is_noted() -> None:
    verdict = judge(_Odd(), "steered")
    assert verdict.outcome == EXACT
    assert any(is_parameter and "_steered" in caller for _, caller, _, is_parameter in verdict.early)


def test_the_runner_judges_in_processes_of_its_own() -> None:
    verdicts = {verdict["name"]: verdict["outcome"] for verdict in judge_all("torch", ["nn.Linear", "nn.None"], jobs=1)}
    assert verdicts == {"nn.Linear": EXACT, "nn.None": UNBUILDABLE}
