"""The dimension keeps the contract, and splits the tables. Runs in one process and under torchrun."""

import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate.dimensions import Dimension, FullyShard
from nucleate.errors import ConfigurationError
from nucleate.strategies import Parallel
from nucleate.testing import DimensionSuite, TinyGPT
from nucleate_example import VocabularyParallel


class TestVocabulary(DimensionSuite):
    def make_dimension(self) -> Dimension:
        return VocabularyParallel()


def test_its_name_stands_for_it() -> None:
    strategy = Parallel(mesh={"dp_shard": -1, "vocab": 2}, dimensions=["fully_shard", "vocabulary_parallel"])
    # FullyShard wraps around it, in whatever order they are given.
    assert [type(dimension) for dimension in strategy.dimensions] == [VocabularyParallel, FullyShard]


def test_only_the_tables_are_split() -> None:
    strategy = Parallel(mesh={"vocab": 8}, dimensions=[VocabularyParallel()])
    with torch.device("meta"):
        layout = strategy.planned_layout(TinyGPT(), 8)
    assert layout is not None
    split = [name for name in layout if layout[name].local_shape(0) != layout[name].shape]
    assert split == ["embedding.weight", "head.weight"]
    assert layout["head.weight"].local_shape(7) == (5, 16)


def test_a_model_that_does_not_fit_is_refused_before_anything_is_changed() -> None:
    def refused(model: nn.Module, *, size: int, dimension: Dimension) -> str:
        with pytest.raises(ConfigurationError) as error:
            Parallel(mesh={"vocab": size}, dimensions=[dimension]).planned_layout(model, size)
        return str(error.value)

    model = TinyGPT()
    assert "pad the vocabulary to 42 words" in refused(model, size=3, dimension=VocabularyParallel())
    assert "no Linear of that name. It has blocks.0.qkv" in refused(
        model, size=2, dimension=VocabularyParallel(head="lm_head")
    )


def test_an_optimizer_that_cannot_step_split_tables_is_refused() -> None:
    runtime = Runtime(accelerator="cpu", strategy=Parallel(mesh={"vocab": -1}, dimensions=[VocabularyParallel()]))
    with runtime.init_module(empty_init=True):
        model = TinyGPT()
    optimizer = torch.optim.LBFGS(model.parameters())
    if runtime.world_size == 1:
        runtime.setup(model, optimizer)
        return
    with pytest.raises(ConfigurationError, match="LBFGS"):
        runtime.setup(model, optimizer)
