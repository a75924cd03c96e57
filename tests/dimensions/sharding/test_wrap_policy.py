"""Which modules become units."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from nucleate.dimensions.sharding.wrap_policy import find_units, whole_parameters
from nucleate.errors import ConfigurationError
from nucleate.strategies import FSDPStrategy, declare_units
from tests.device import ACCELERATOR

pytestmark = pytest.mark.usefixtures("factories_on_device")


class Callable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Block(Callable):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm = nn.LayerNorm(4)


class Model(Callable):
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
    with pytest.raises(ConfigurationError, match="not a module class"):
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

    runtime = Runtime(accelerator=ACCELERATOR, strategy="fsdp")
    cases = {
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


def test_parameters_that_are_not_trained_may_have_other_dtypes() -> None:
    from nucleate import Runtime

    model = nn.Sequential(nn.Linear(4, 4))
    model[0].codes = nn.Parameter(torch.arange(5, dtype=torch.uint8), requires_grad=False)
    model[0].scale = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
    runtime = Runtime(accelerator=ACCELERATOR, strategy="fsdp")
    runtime.launch()
    model = runtime.strategy.setup(model)
    model(torch.ones(2, 4)).sum().backward()
    assert model[0].weight.grad is not None
    assert model[0].codes.full_tensor().tolist() == [0, 1, 2, 3, 4]
    assert model[0].scale.dtype == torch.float64


def test_different_parameters_in_one_memory_are_refused_unless_they_do_not_overlap() -> None:
    from nucleate import Runtime

    class Views(Callable):
        def __init__(self, overlap: int) -> None:
            super().__init__()
            whole = torch.randn(8, 2)
            self.a = nn.Parameter(whole[: 4 + overlap])
            self.b = nn.Parameter(whole[4:])

    runtime = Runtime(accelerator=ACCELERATOR, strategy="fsdp")
    with runtime.init_module():
        model = Views(overlap=1)
    with pytest.raises(ConfigurationError, match="a and b are different parameters that share memory"):
        runtime.setup(model)
    with runtime.init_module():
        model = Views(overlap=0)
    runtime.setup(model)


class Stages(Callable):
    """Blocks within repeated stages, and repeated layers elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(Block(), nn.LayerNorm(4)) for _ in range(2))
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def test_auto_takes_what_was_declared_and_repeated_blocks_elsewhere() -> None:
    model = Stages()
    assert names(find_units(model, "auto")) == ["tail.1", "tail.0", "stages.1", "stages.0"]
    declare_units(module for module in model.modules() if isinstance(module, (Block, nn.Identity)))
    assert names(find_units(model, "auto")) == ["tail.1", "tail.0", "stages.1.0", "stages.0.0"]
    assert names(find_units(copy.deepcopy(model), "auto")) == names(find_units(model, "auto"))
    assert names(find_units(model, {nn.LayerNorm})) == [
        "stages.1.1",
        "stages.1.0.norm",
        "stages.0.1",
        "stages.0.0.norm",
    ]


def test_what_is_declared_is_no_unit_where_it_shares_parameters_or_is_the_root() -> None:
    model = Model()
    declare_units([model, model.embedding, model.blocks[1], nn.ReLU()])
    assert names(find_units(model, "auto")) == ["blocks.2", "blocks.1", "blocks.0"]


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


@pytest.mark.parametrize("shell", [checkpoint_wrapper, compiled, lambda module: compiled(checkpoint_wrapper(module))])
@pytest.mark.parametrize("policy", ["auto", {Block}, lambda name, module: name.startswith("blocks.")])
def test_the_outermost_shell_of_a_block_becomes_the_unit(policy: Any, shell: Any) -> None:
    plain = find_units(Model(), policy)
    model = Model()
    for number in (0, 2):  # The block between has no shell.
        model.blocks[number] = shell(model.blocks[number])
    units = find_units(shell(model), policy)
    assert names(units) == names(plain)
    blocks = {name: unit for name, unit in units if name in ("blocks.0", "blocks.1", "blocks.2")}
    assert list(blocks.values()) == list(reversed(model.blocks))


def test_a_container_in_a_shell_is_not_a_unit() -> None:
    model = Model()
    model.blocks = checkpoint_wrapper(model.blocks)
    assert names(find_units(model, {nn.ModuleList})) == []
    assert sorted(names(find_units(model, "auto"))) == ["blocks.0", "blocks.1", "blocks.2"]


class Holder(Callable):
    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.own, self.shared = nn.Linear(4, 4), shared


class Shared(Callable):
    """Blocks that hold one module, as those of Zamba do."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Holder(shared) for _ in range(3))


def whole(model: nn.Module, policy: object = "auto") -> list[str]:
    found = whole_parameters(model, find_units(model, policy))  # type: ignore[arg-type]
    return [name for name, parameter in model.named_parameters() if parameter in found]


def test_a_module_that_several_units_hold_is_a_unit_of_its_own_and_comes_first() -> None:
    expected = ["blocks.0.shared", "blocks.2", "blocks.1", "blocks.0"]
    assert names(find_units(Shared(nn.Linear(4, 4)), "auto")) == expected
    model = Shared(Holder(nn.Linear(4, 4)))
    assert names(find_units(model, "auto")) == expected
    inner = ["blocks.0.shared.shared", "blocks.0.shared.own"]
    assert names(find_units(model, {nn.Linear})) == ["blocks.2.own", "blocks.1.own", *inner, "blocks.0.own"]
    assert names(find_units(model, {nn.Linear, Holder}))[-4:] == expected
    model.beside = model.blocks[0].shared
    assert names(find_units(model, lambda name, _: name == "blocks.0")) == ["blocks.0.shared", "blocks.0"]
    # Without parameters there is nothing to share.
    assert names(find_units(Shared(nn.ReLU()), "auto")) == ["blocks.2", "blocks.1", "blocks.0"]


def test_blocks_are_no_units_if_what_they_share_cannot_be_one() -> None:
    model = Shared(nn.ParameterList([nn.Parameter(torch.ones(2))]))
    assert names(find_units(model, "auto")) == []
    model = Shared(nn.Linear(4, 4, bias=False))
    model.head = nn.Linear(4, 4)
    model.head.weight = model.blocks[0].shared.weight
    assert names(find_units(model, "auto")) == []


def test_the_parts_of_a_model_without_a_forward_are_units() -> None:
    trunk = nn.Linear(4, 4)
    model = nn.ModuleDict({"actor": nn.Sequential(nn.Linear(4, 4), trunk), "critic": nn.Sequential(trunk)})
    for policy in ("auto", lambda *_: False):
        assert names(find_units(model, policy))[-2:] == ["critic", "actor"]
        assert "actor.1" in names(find_units(model, policy))
        assert whole(model, policy) == []


def test_parameters_that_no_single_part_holds_stay_whole() -> None:
    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.actor, self.critic = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
            self.critic[0].weight = self.actor.weight
            self.critic.scale = nn.Parameter(torch.ones(()))
            self.log_std = nn.Parameter(torch.ones(4))
            self.extra = nn.ParameterList([nn.Parameter(torch.ones(2))])

    assert whole(Agent()) == ["log_std", "actor.weight", "critic.scale", "extra.0"]
    # With a forward, tied parameters belong to the root, which gathers them.
    assert whole(nn.Sequential(Shared(nn.Linear(4, 4)), nn.Linear(4, 4))) == []
