"""`TensorParallel("auto")` takes the plan that a model brings: a declared one, or the words in `tp_plan`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from nucleate.dimensions import ModelPlan, TensorParallel, declare_plan
from nucleate.errors import ConfigurationError
from nucleate.layout import Mesh, Shard

TP = Mesh.of({"tp": 2})


class Library(ModelPlan):
    """A plan that says what it was asked for."""

    def __init__(self) -> None:
        self.applied: list[nn.Module] = []

    def check(self, model: nn.Module, size: int) -> None:
        if size > 2:
            raise ConfigurationError(f"{type(model).__name__} is for 2 ranks, not {size}")

    def splits(self, model: nn.Module) -> Mapping[str, Shard | None] | None:
        return None if hasattr(model, "is_open") else {"weight": Shard(0), "bias": None}

    def apply(self, model: nn.Module, mesh: Any) -> None:
        self.applied.append(model)


def test_a_declared_plan_checks_says_and_lays_out() -> None:
    plan, model = Library(), nn.Linear(4, 4)
    declare_plan(model, plan)
    dimension = TensorParallel()
    dimension.check_model(model, TP)
    assert dimension.placements(model, TP) == {"weight": {"tp": Shard(0)}, "bias": {}}
    dimension.apply(model, {"tp": None})  # type: ignore[arg-type]
    assert plan.applied == [model]
    with pytest.raises(ConfigurationError, match="Linear is for 2 ranks, not 4"):
        dimension.check_model(model, Mesh.of({"tp": 4}))


def test_parts_of_a_model_and_copies_keep_their_plans_and_the_outermost_counts() -> None:
    model = nn.ModuleDict({"text": nn.Sequential(nn.Linear(4, 4)), "head": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    for part in (model["text"], model["text"][0], model["head"]):  # type: ignore[index]
        declare_plan(part, Library())
    found = TensorParallel().placements(copy.deepcopy(model), TP)
    assert found is not None
    assert sorted(found) == ["head.bias", "head.weight", "text.bias", "text.weight"]


def test_splits_that_are_known_later_are_not_said() -> None:
    model = nn.Linear(4, 4)
    model.is_open = True
    declare_plan(model, Library())
    assert TensorParallel().placements(model, TP) is None


def test_a_plan_of_the_user_goes_first() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    declare_plan(model, Library())
    assert TensorParallel({"0": "rowwise"}).placements(model, TP) == {"0.weight": {"tp": Shard(1)}, "0.bias": {}}


def test_a_split_loss_needs_a_plan_of_words() -> None:
    model = nn.Linear(4, 4)
    declare_plan(model, Library())
    with pytest.raises(ConfigurationError, match="loss_parallel=True needs logits that stay split.*a plan of words"):
        TensorParallel(loss_parallel=True).check_model(model, TP)


def test_a_quantized_weight_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigurationError, match=r"0\.weight \(torch\.uint8\), and a quantized weight cannot be split"):
        TensorParallel({"0": "rowwise"}).check_model(model, TP)
    declare_plan(model[0], Library())
    with pytest.raises(ConfigurationError, match=r"0\.weight \(torch\.uint8\).*strategy='fsdp'"):
        TensorParallel().check_model(model, TP)


class Words(nn.Module):
    def __init__(self, plan: Any) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.tp_plan = plan


def test_words_that_a_model_brings_need_no_integration() -> None:
    found = TensorParallel().placements(Words({"up": "colwise", "down": "rowwise"}), TP)
    assert found is not None
    assert found["down.weight"] == {"tp": Shard(1)}


def test_a_plan_of_a_library_without_its_integration_is_refused_with_the_command_that_installs_it() -> None:
    model = Words({"up": "colwise_gather_output"})
    with pytest.raises(ConfigurationError, match=r"`Words.tp_plan`: the style 'colwise_gather_output'.*unknown"):
        TensorParallel().check_model(model, TP)
    of_library = type("LlamaForCausalLM", (Words,), {"__module__": "transformers.models.llama.modeling_llama"})
    with pytest.raises(ConfigurationError, match=r"pip install nucleate-transformers"):
        TensorParallel().check_model(of_library({"up": "colwise_gather_output"}), TP)


def test_a_model_without_a_plan_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"reads the plan that a model brings.*Linear has none"):
        TensorParallel().check_model(nn.Linear(4, 4), TP)
