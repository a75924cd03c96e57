"""Which modules become units."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nucleate.errors import ConfigurationError
from nucleate.strategies import FSDPStrategy
from nucleate.strategies.wrap_policy import find_units


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight


def names(units: list[tuple[str, nn.Module]]) -> list[str]:
    return [name for name, _ in units]


def test_auto_finds_the_outermost_repeated_blocks() -> None:
    assert sorted(names(find_units(Model(), "auto"))) == ["blocks.0", "blocks.1", "blocks.2"]
    assert names(find_units(nn.Linear(2, 2), "auto")) == []


def test_auto_takes_repeated_layers_of_a_sequence_but_not_those_without_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    assert sorted(names(find_units(model, "auto"))) == ["0", "2"]


def test_inner_modules_come_before_those_that_hold_them() -> None:
    units = names(find_units(Model(), {Block, nn.Linear}))
    assert units.index("blocks.0.experts.1") < units.index("blocks.0")


def test_a_predicate_sees_name_and_module() -> None:
    units = find_units(Model(), lambda name, module: name.endswith("norm") and isinstance(module, nn.LayerNorm))
    assert sorted(names(units)) == ["blocks.0.norm", "blocks.1.norm", "blocks.2.norm"]


def test_tied_parameters_are_left_to_the_unit_that_holds_all_of_them() -> None:
    assert names(find_units(Model(), {nn.Embedding, nn.Linear})) == [
        f"blocks.{block}.experts.{expert}" for block in (2, 1, 0) for expert in (1, 0)
    ]


def test_containers_without_a_forward_and_the_root_are_no_units() -> None:
    assert names(find_units(Model(), lambda name, module: isinstance(module, (nn.ModuleList, Model)))) == []


def test_a_class_that_does_not_occur_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigurationError, match=r"names Conv2d, but Model has none.*It has: Block, Embedding"):
        find_units(Model(), {nn.Conv2d})
    with pytest.raises(ConfigurationError, match="no module class"):
        find_units(Model(), [Block()])  # type: ignore[list-item]


@pytest.mark.parametrize("arguments", [{"wrap": "blocks"}, {"num_replicas": 0}, {"num_replicas": True}])
def test_the_strategy_refuses_wrong_policies_at_once(arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        FSDPStrategy(**arguments)  # type: ignore[arg-type]


def test_what_cannot_be_sharded_is_refused_by_name_before_anything_changes() -> None:
    from nucleate import Runtime

    def model_with(parameter: nn.Parameter) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4))
        model[0].extra = parameter
        return model

    runtime = Runtime(accelerator="cpu", strategy="fsdp")
    cases = {
        r"without a dimension: 0\.extra": lambda: nn.Parameter(torch.tensor(1.0)),
        r"not contiguous: 0\.extra": lambda: nn.Parameter(torch.ones(3, 4).t()),
        r"one dtype, but in the root .*0\.extra is torch.float64": lambda: nn.Parameter(torch.ones(3).double()),
    }
    for message, make in cases.items():
        with runtime.init_module():
            model = model_with(make())
        if "dtype" in message:
            with pytest.raises(ConfigurationError, match=message):
                runtime.strategy.setup(model)
        else:
            with pytest.raises(ConfigurationError, match=message):
                runtime.setup(model)
            assert "deferred" in repr(model[0].weight)


def test_different_parameters_in_one_memory_are_refused_unless_they_do_not_overlap() -> None:
    from nucleate import Runtime

    class Views(nn.Module):
        def __init__(self, overlap: int) -> None:
            super().__init__()
            whole = torch.randn(8, 2)
            self.a = nn.Parameter(whole[: 4 + overlap])
            self.b = nn.Parameter(whole[4:])

    runtime = Runtime(accelerator="cpu", strategy="fsdp")
    with runtime.init_module():
        model = Views(overlap=1)
    with pytest.raises(ConfigurationError, match="a and b are different parameters that share memory"):
        runtime.setup(model)
    with runtime.init_module():
        model = Views(overlap=0)
    runtime.setup(model)
