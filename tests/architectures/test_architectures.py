"""All of torch.nn, and architectures of transformers that differ in what their constructors do, are exact.

The `zoo` session judges every architecture; this is the part that every change has to pass. Models of packages that
are not installed are left to that session.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from tests.architectures.case import Case, Family
from tests.architectures.families import NAMED, family
from tests.architectures.pool import judge_all
from tests.architectures.torch_family import TorchFamily
from tests.architectures.torchrec_family import ON_META
from tests.architectures.verdict import DIFFERENT, EXACT, HEAP, UNBUILDABLE, judge
from tests.device import cpu_only

TRANSFORMERS = [
    *NAMED["transformers"],
    "BertModel", "BigBirdModel", "CLIPModel", "ConvNextModel",
    "DeepseekV3ForCausalLM", "DebertaV2Model", "EncodecModel", "GPT2LMHeadModel", "Gemma3ForConditionalGeneration",
    "HubertModel", "LlamaForCausalLM", "MambaModel", "Mamba2Model", "MixtralForCausalLM", "RecurrentGemmaModel",
    "RwkvModel", "SwinModel", "T5ForConditionalGeneration", "VitsModel", "Wav2Vec2ForCTC", "Wav2Vec2ForPreTraining",
    "Wav2Vec2Model", "WhisperForConditionalGeneration", "XLNetModel", "JambaModel",
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


def test_the_zoo_holds_the_models_that_are_asked_for_by_name() -> None:
    assert set(NAMED["transformers"]) == {
        "ViTModel", "ViTForMaskedImageModeling", "ViTForImageClassification", "Blip2Model",
        "Blip2ForConditionalGeneration",
    }  # fmt: skip
    assert set(NAMED["torchaudio"]) == {"wav2vec2_base", "hubert_base"}
    assert {"EmbeddingBagCollection", "DLRM", "DeepFM"} <= set(NAMED["torchrec"])
    for name, models in NAMED.items():
        assert set(models) <= set(family(name).names())
    assert set(family("transformers-default-size").names()) == set(NAMED["transformers"])


def _is_installed(package: str) -> bool:
    # torchrec's compiled part is a package of its own, and not there for every machine.
    imported = {"torchaudio": ("torchaudio",), "torchrec": ("torchrec", "fbgemm_gpu")}[package]
    return all(importlib.util.find_spec(name) is not None for name in imported)


@pytest.mark.parametrize("package", ["torchaudio", "torchrec"])
def test_the_models_that_are_asked_for_by_name_are_exact(package: str) -> None:
    if not _is_installed(package):
        pytest.skip(f"{package} is not installed")
    # In a process of its own: what these packages do when they are imported is no concern of other tests.
    verdicts = {verdict["name"]: verdict for verdict in judge_all(package, list(NAMED[package]), jobs=1)}
    assert {name: verdict["outcome"] for name, verdict in verdicts.items()} == dict.fromkeys(NAMED[package], EXACT), (
        verdicts
    )
    assert not any(verdict["early"] for verdict in verdicts.values())


@cpu_only("the tables that they are compared with are reset by hand on the CPU")
@pytest.mark.skipif(not _is_installed("torchrec"), reason="torchrec is not installed")
def test_tables_of_torchrec_that_are_built_on_meta_are_what_resetting_them_by_hand_makes() -> None:
    verdicts = {verdict["name"]: verdict for verdict in judge_all("torchrec", list(ON_META), jobs=1)}
    assert {name: verdict["outcome"] for name, verdict in verdicts.items()} == dict.fromkeys(ON_META, EXACT), verdicts


class _Odd(Family):
    """Cases that must not pass."""

    def names(self) -> list[str]:
        return ["different each time", "draws more each time", "unwritten", "broken", "steered", "answers otherwise"]

    def case(self, name: str) -> Case:
        self.calls = 0
        if name == "answers otherwise":
            return Case(lambda: nn.Linear(2, 2), forward=self._answer)
        if name == "made by hand":
            return Case(lambda: nn.Linear(2, 2), by_hand=lambda module: module.reset_parameters())
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

    def _answer(self, model: nn.Module) -> torch.Tensor:
        self.calls += 1
        return model(torch.ones(self.calls, 2))

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


@cpu_only("a few numbers more move a device's generator no further")
def test_a_stream_that_ends_elsewhere_is_found() -> None:
    verdict = judge(_Odd(), "draws more each time")
    assert verdict.outcome == DIFFERENT
    assert "random stream" in verdict.details[0]


def test_memory_that_eager_construction_leaves_unwritten_is_an_outcome_of_its_own() -> None:
    verdict = judge(_Odd(), "unwritten")
    assert (verdict.outcome, verdict.details) == (HEAP, ["extra"])


def test_an_output_that_differs_is_found() -> None:
    verdict = judge(_Odd(), "answers otherwise")
    assert (verdict.outcome, verdict.details) == (DIFFERENT, ["forward: other values"])


def test_what_is_made_by_hand_is_what_setup_is_compared_with() -> None:
    verdict = judge(_Odd(), "made by hand")
    assert verdict.outcome == DIFFERENT
    moved, *values = verdict.details
    assert moved == "materialization moves a random stream"
    assert sorted(values) == ["bias: other values", "weight: other values"]


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
