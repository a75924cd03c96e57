"""The plans of tensor parallel of transformers: what is promised on several ranks, and what is refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from scripts.plans import CHECKS
from torchrun import fork_ranks
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from nucleate.dimensions import FullyShard, TensorParallel
from nucleate.errors import ConfigurationError
from nucleate.layout import Mesh, Shard
from nucleate.strategies import Parallel
from nucleate_transformers import declare_plans, tensor_plan
from nucleate_transformers.tensor_plan import TransformersPlan, concrete_plan


@pytest.mark.parametrize("models", ["some", pytest.param("all", marks=pytest.mark.long)])
@pytest.mark.parametrize("nproc", [2, 4])
def test_a_plan_of_transformers_is_exact_on_ranks(nproc: int, models: str, tmp_path: Path) -> None:
    output = fork_ranks("plans.py", nproc, tmp_path, models)
    assert [output.count(f"{check.__name__}: kept") for check in CHECKS] == [nproc] * len(CHECKS)


def llama(**sizes: Any) -> Any:
    config = tiny.config_of("llama")
    for field, value in sizes.items():
        setattr(config, field, value)
    with torch.device("meta"):
        return hf.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48},
            r"q_proj by heads.*num_attention_heads=3 .*tp=4",
        ),
        ({}, r"k_proj by heads.*num_key_value_heads=2 is not a multiple of tp=4"),
        (
            {"num_key_value_heads": 4, "vocab_size": 98},
            r"embed_tokens.weight.*98 is not a multiple of 4.*pad_to_multiple_of=4",
        ),
        ({"num_key_value_heads": 4, "intermediate_size": 66}, r"gate_proj.weight.*66 is not a multiple of 4"),
    ],
)
def test_a_model_that_the_ranks_cannot_share_is_refused_by_name(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TransformersPlan().check(llama(**sizes), 4)


def test_packed_experts_are_split_in_each_of_their_parts() -> None:
    config = tiny.config_of("mixtral")
    config.intermediate_size = 62
    with torch.device("meta"):
        model = hf.MixtralForCausalLM(config)
    with pytest.raises(ConfigurationError, match=r"gate_up_proj.*of each of 2 parts.*124 is not a multiple of 8"):
        TransformersPlan().check(model, 4)


def test_half_of_a_tie_is_refused_with_the_rule_that_is_missing() -> None:
    config = tiny.config_of("gpt-neox")
    config.tie_word_embeddings = True
    model = hf.GPTNeoXForCausalLM(config)
    with pytest.raises(ConfigurationError, match=r"are tied.*update\(\{'gpt_neox.embed_in': 'embedding_rowwise'\}\)"):
        TransformersPlan().check(model, 2)
    model.tp_plan.update({"gpt_neox.embed_in": "embedding_rowwise"})
    TransformersPlan().check(model, 2)


def test_a_model_without_a_plan_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"BartForConditionalGeneration.*no `tp_plan`.*plan of words"):
        TransformersPlan().check(tiny.construct("bart"), 2)


def test_the_plan_says_the_split_of_each_parameter() -> None:
    splits = TransformersPlan().splits(tiny.construct("mixtral"))
    assert splits is not None
    assert splits["model.embed_tokens.weight"] == Shard(0)
    assert splits["model.layers.0.self_attn.o_proj.weight"] == Shard(1)
    assert splits["model.layers.0.mlp.experts.gate_up_proj"] == Shard(1, 2)
    assert splits["model.layers.0.mlp.experts.down_proj"] == Shard(2)
    assert "model.norm.weight" not in splits


def test_a_model_inside_of_another_module_keeps_its_plan() -> None:
    whole = torch.nn.ModuleDict({"text": tiny.construct("llama")})
    declare_plans(whole)
    placements = TensorParallel().placements(whole, Mesh.of({"tp": 2}))
    assert placements is not None
    assert placements["text.lm_head.weight"] == {"tp": Shard(0)}


def test_the_layout_for_many_ranks_is_asked_before_setup() -> None:
    strategy = Parallel(mesh={"dp_shard": -1, "tp": 2}, dimensions=[FullyShard(), TensorParallel()])
    model = llama()
    declare_plans(model)
    layout = strategy.planned_layout(model, 64)
    assert layout is not None
    assert layout["model.layers.0.mlp.up_proj.weight"].local_shape(0) == (1, 32)
    assert sum(layout["lm_head.weight"].local_bytes(rank) for rank in range(64)) == 96 * 32 * 4


# The names of transformers that only `tensor_plan.py` uses.


def test_every_style_of_transformers_is_known() -> None:
    assert all(tensor_plan._is_known(style) for style in _styles_of_tensor_parallel())


def _styles_of_tensor_parallel() -> list[str]:
    expert = ("grouped_gemm", "ep_dispatch_experts")
    return [style for style in ALL_PARALLEL_STYLES if style not in expert]


def test_the_functions_of_transformers_have_the_arguments_that_we_give() -> None:
    assert list(inspect.signature(apply_tensor_parallelism).parameters) == ["model", "tp_mesh", "tp_plan"]
    model = tiny.construct("llama-tied")
    assert list(inspect.signature(model._resolve_parallel_plans).parameters) == ["distributed_config"]
    assert (model._tp_size, model.tp_size) == (None, None)
    styles = concrete_plan(model, 2)
    # Names of parameters get the style that splits them, names of modules the one around their forward.
    assert styles["model.layers.1.mlp.up_proj.weight"] == styles["model.layers.1.mlp.up_proj"] == "colwise"
    # Both names of a tied parameter are there, which `apply_tensor_parallelism` does not take.
    assert styles["lm_head.weight"] == "colwise_gather_output"
    with pytest.raises(KeyError, match=r"lm_head\.weight"):
        apply_tensor_parallelism(model, None, {"lm_head.weight": styles["lm_head.weight"]})


def test_rules_replace_those_of_the_model() -> None:
    model = tiny.construct("llama")
    styles = concrete_plan(model, 2, {"model.layers.*.mlp.up_proj": "colwise_gather_output"})
    assert styles["model.layers.0.mlp.up_proj"] == "colwise_gather_output"
    assert model.tp_plan["model.layers.*.mlp.up_proj"] == "colwise_gather_output"
    assert model.tp_plan["lm_head"] == "colwise_gather_output"
    with pytest.raises(ConfigurationError, match=r"nothing_here.*match nothing"):
        concrete_plan(model, 2, {"nothing_here": "colwise"})
    with pytest.raises(ConfigurationError, match=r"Unsupported `tp_plan` styles.*sideways"):
        concrete_plan(model, 2, {"lm_head": "sideways"})
