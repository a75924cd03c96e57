"""Which layers are quantized."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.quantizers.base import get_keys_to_not_convert

from nucleate.errors import ConfigurationError
from nucleate_bitsandbytes.selection import is_named, linears_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)


class Model(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 10, bias=False)
        self.lm_head = nn.Linear(8, 10, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def names(model: nn.Module, skip: list[str] | None = None) -> list[str]:
    return [fqn for fqn, _ in linears_of(model, skip)]


def test_plain_linear_layers_are_chosen_but_the_head_that_makes_logits() -> None:
    # The projection inside of attention is a class of its own, whose weight attention uses itself.
    assert names(Model()) == ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "head"]


def test_a_skip_list_takes_the_place_of_the_default() -> None:
    assert names(Model(), []) == [*names(Model()), "lm_head"]
    assert names(Model(), ["layers.1", "up", "lm_head"]) == ["layers.0.down", "head"]


def test_a_name_stands_for_whole_parts_of_names() -> None:
    assert is_named("layers.10.up", ("layers.10",))
    assert is_named("layers.10.up", ("10.up",))
    assert not is_named("layers.10.up", ("layers.1",))
    assert not is_named("layers.10.up", ("u",))


def test_a_name_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"'layer\.1'"):
        names(Model(), ["layer.1"])


def test_layers_that_are_tied_are_left_alone() -> None:
    assert "head" not in names(Model(tied=True))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert names(model) == ["2"]


def test_a_layer_that_is_used_twice_is_one_layer() -> None:
    linear = nn.Linear(4, 4)
    assert names(nn.Sequential(linear, nn.ReLU(), linear)) == ["0"]


def test_what_a_model_keeps_in_full_is_left_alone() -> None:
    model = Model()
    model._keep_in_fp32_modules = ["down"]
    assert names(model) == ["layers.0.up", "layers.1.up", "head"]


def test_subclasses_are_left_alone() -> None:
    class Odd(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.cos().T

    assert names(nn.Sequential(Odd(4, 4), nn.Linear(4, 4))) == ["1"]


def test_the_heads_of_transformers_models_are_those_that_transformers_leaves_alone() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.GPTNeoXConfig(**sizes, intermediate_size=24)
    for model in (
        hf.GPTNeoXForCausalLM(config),
        hf.LlamaForSequenceClassification(hf.LlamaConfig(**sizes, intermediate_size=24)),
        hf.BertForSequenceClassification(hf.BertConfig(**sizes, intermediate_size=24)),
    ):
        theirs = get_keys_to_not_convert(model)
        linears = [fqn for fqn, module in model.named_modules() if type(module) is nn.Linear]
        assert names(model) == [fqn for fqn in linears if fqn not in theirs]
    # A list says all there is to skip.
    assert "lm_head" in names(hf.GPTNeoXForCausalLM(config), [])
