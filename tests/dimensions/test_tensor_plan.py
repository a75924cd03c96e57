"""A plan of tensor parallel is held against the model before anything is changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel

from nucleate.dimensions.tensor_plan import TensorPlan
from nucleate.errors import ConfigurationError
from nucleate.layout import Shard


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 4)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.qkv, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 30), nn.Linear(30, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 1)


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(8, 12, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def model(**options: Any) -> Model:
    with torch.device("meta"):
        return Model(**options)


def test_styles_say_how_each_parameter_is_split() -> None:
    plan = TensorPlan.of(
        {
            "embed": "rowwise",
            "layers.*.qkv": "fused_3",
            "layers.*.up": "colwise",
            "layers.*.down": "rowwise",
            "layers.0.norm": "sequence",
            "head": "colwise_gathered",
        }
    )
    splits = plan.splits(model())
    assert splits["embed.weight"] == Shard(0)
    assert splits["layers.1.qkv.weight"] == splits["layers.1.qkv.bias"] == Shard(0, 3)
    assert splits["layers.0.up.weight"] == splits["layers.0.up.bias"] == Shard(0)
    assert splits["layers.0.down.weight"] == Shard(1)
    assert splits["layers.0.down.bias"] is None
    assert splits["layers.0.norm.weight"] is None
    assert splits["head.weight"] == Shard(0)
    assert "layers.1.norm.weight" not in splits
    plan.check(model(), 2)
    assert plan.is_known
    assert not TensorPlan.of({"head": ColwiseParallel()}).is_known


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"layer.*.up": "colwise"}, r"'layer\.\*\.up' of the plan matches no module of Model.*layers\.\*\.up"),
        ({"layers.*": "colwise"}, "layers.0 the style 'colwise', which a Layer cannot have"),
        ({"layers.*.conv": "rowwise"}, "layers.0.conv the style 'rowwise', which a Conv1d cannot have"),
        ({"embed": "fused_2"}, "embed the style 'fused_2', which a Embedding cannot have"),
        ({"layers.*.up": "colwise", "layers.0.*": "rowwise"}, "give layers.0.up two styles, 'colwise' and 'rowwise'"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused_by_name(plan: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TensorPlan.of(plan).check(model(), 2)


@pytest.mark.parametrize(
    ("plan", "size", "message"),
    [
        ({"layers.*.up": "colwise"}, 4, r"layers\.0\.up\.weight of shape \(30, 8\) splits dim 0 over tp=4, and 30 is"),
        ({"layers.*.down": "rowwise"}, 4, r"layers\.0\.down\.weight of shape \(8, 30\) splits dim 1"),
        ({"layers.*.qkv": "fused_5"}, 2, "of each of 5 parts over tp=2, and 24 is not a multiple of 10"),
        ({"embed": "rowwise"}, 5, "and 12 is not a multiple of 5"),
    ],
)
def test_a_size_that_does_not_divide_is_refused_by_name(plan: dict[str, str], size: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TensorPlan.of(plan).check(model(), size)


@pytest.mark.parametrize("field", ["num_attention_heads", "num_key_value_heads"])
def test_heads_that_the_ranks_cannot_share_are_refused(field: str) -> None:
    whole = model()
    whole.config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=4)  # type: ignore[assignment]
    plan = TensorPlan.of({"layers.*.attn.q": "colwise"})
    plan.check(whole, 4)
    setattr(whole.config, field, 2)
    with pytest.raises(ConfigurationError, match=rf"layers\.0\.attn\.q.*{field}=2, which is not a multiple of tp=4"):
        plan.check(whole, 4)
    # Layers outside of attention do not care.
    TensorPlan.of({"layers.*.qkv": "colwise"}).check(whole, 4)


def test_a_tie_of_which_the_plan_splits_one_is_refused() -> None:
    tied = model(tied=True)
    TensorPlan.of({"embed": "rowwise", "head": "colwise_gathered"}).check(tied, 2)
    for plan in ({"head": "colwise_gathered"}, {"embed": "colwise", "head": "colwise_gathered"}):
        with pytest.raises(ConfigurationError, match=r"embed\.weight, head\.weight are tied, and the plan"):
            TensorPlan.of(plan).check(tied, 2)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "plan={} must give patterns"),
        ("colwise", "plan='colwise' must give patterns"),
        ({"up": "columnwise"}, "the style 'columnwise' of the pattern 'up' is unknown. Styles: colwise"),
        ({"up": "fused_1x"}, "the style 'fused_1x'"),
        ({"up": 3}, "is 3, which is neither a word nor a ParallelStyle"),
    ],
)
def test_a_plan_that_is_none_is_refused(plan: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TensorPlan.of(plan)
