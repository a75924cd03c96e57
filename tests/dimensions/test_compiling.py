"""Blocks are compiled in place: names stay, and the values are those of the plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nucleate.dimensions import Compile
from nucleate.errors import ConfigurationError
from nucleate.layout import Mesh

MESH = Mesh((), ())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x)) + x


def model() -> nn.Sequential:
    return nn.Sequential(Block(), Block(), nn.Linear(4, 2))


# Dynamo asks tensors inside of a graph for their gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_each_block_is_compiled_and_names_and_values_stay() -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    plain = model()
    names, x = list(plain.state_dict()), torch.randn(3, 4)
    expected = plain(x)
    dimension = Compile(backend=backend)
    dimension.check_model(plain, MESH)
    dimension.apply(plain, None)  # type: ignore[arg-type]
    assert torch.equal(plain(x), expected)
    assert list(plain.state_dict()) == names
    # The blocks share their code, and the last layer has none.
    assert 1 <= len(compiled) <= 2
    assert plain[2]._compiled_call_impl is None


def test_the_whole_model_may_be_compiled() -> None:
    plain = model()
    Compile(per_block=False, backend="eager").apply(plain, None)  # type: ignore[arg-type]
    assert plain._compiled_call_impl is not None
    assert plain[0]._compiled_call_impl is None


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="finds no block in Linear"):
        Compile().check_model(nn.Linear(2, 2), MESH)
    with pytest.raises(ConfigurationError, match="per_block=False compiles the whole model"):
        Compile(per_block=False, blocks=Block)
