"""Lightning Fabric's keywords of strategies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffload,
    CPUOffloadPolicy,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardingStrategy,
)
from torch.distributed.fsdp.wrap import (
    CustomPolicy,
    ModuleWrapPolicy,
    size_based_auto_wrap_policy,
    transformer_auto_wrap_policy,
)

from nucleate import Runtime
from nucleate.cluster import Environment
from nucleate.errors import ConfigurationError
from nucleate.plugin import Composition
from nucleate.strategies import DDPStrategy, FSDPStrategy


class Block(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def on(strategy: FSDPStrategy, num_nodes: int, per_node: int) -> FSDPStrategy:
    """Let a strategy check its number of processes, as `Runtime` does."""
    environment = Environment("torchrun", world_size=num_nodes * per_node, local_world_size=per_node)
    runtime = Runtime(accelerator="cpu", strategy="single_device")
    strategy.check(Composition(runtime.accelerator, runtime.precision, strategy, environment, torch.device("cpu")))
    return strategy


@pytest.mark.parametrize(
    ("value", "reshard", "num_replicas"),
    [
        ("FULL_SHARD", None, 1),
        ("full_shard", None, 1),
        (ShardingStrategy.FULL_SHARD, None, 1),
        ("SHARD_GRAD_OP", False, 1),
        (ShardingStrategy.SHARD_GRAD_OP, False, 1),
        ("HYBRID_SHARD", None, 2),
        (ShardingStrategy._HYBRID_SHARD_ZERO2, False, 2),
    ],
)
def test_a_sharding_strategy_stands_for_our_arguments(value: Any, reshard: Any, num_replicas: int) -> None:
    strategy = on(FSDPStrategy(sharding_strategy=value), num_nodes=2, per_node=4)
    assert (strategy.units.reshard_after_forward, strategy.num_replicas) == (reshard, num_replicas)


def test_the_sizes_of_a_hybrid_mesh_are_checked_against_the_processes() -> None:
    make = functools.partial(FSDPStrategy, sharding_strategy="HYBRID_SHARD", device_mesh=(4, 2))
    assert on(make(), 1, 8).num_replicas == 4
    with pytest.raises(ConfigurationError, match=r"device_mesh=\(4, 2\) is for 8 processes, but there are 4"):
        on(make(), 1, 4)


def test_other_spellings_of_the_same_options_are_taken() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    assert FSDPStrategy(mixed_precision=policy).units.mixed_precision is policy
    for value in (True, CPUOffload(offload_params=True), CPUOffloadPolicy()):
        assert FSDPStrategy(cpu_offload=value).units.cpu_offload
    for value in (False, None, CPUOffload(), OffloadPolicy()):
        assert not FSDPStrategy(cpu_offload=value).units.cpu_offload
    assert FSDPStrategy(auto_wrap_policy={Block}).units.wrap == {Block}
    assert FSDPStrategy(state_dict_type="full").saves_one_file
    assert not DDPStrategy(broadcast_buffers=False).replicas.sync_buffers
    FSDPStrategy(
        use_orig_params=True,
        limit_all_gathers=True,
        sync_module_states=True,
        forward_prefetch=False,
        backward_prefetch=BackwardPrefetch.BACKWARD_PRE,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sharding_strategy": "NO_SHARD"}, "strategy='ddp'"),
        ({"sharding_strategy": ShardingStrategy.NO_SHARD}, "strategy='ddp'"),
        ({"sharding_strategy": "HALF"}, "sharding_strategy='HALF' must be one of 'FULL_SHARD'"),
        ({"sharding_strategy": "HYBRID_SHARD", "num_replicas": 2}, "say the same"),
        ({"sharding_strategy": "FULL_SHARD", "reshard_after_forward": True}, "say the same"),
        ({"sharding_strategy": "FULL_SHARD", "device_mesh": (2, 2)}, "cannot stand beside"),
        ({"device_mesh": (2, 0)}, "must be the two numbers"),
        ({"wrap": {Block}, "auto_wrap_policy": {Block}}, "two names of one policy"),
        ({"auto_wrap_policy": "all"}, "auto_wrap_policy='all' is not a policy"),
        (
            {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16)},
            r"MixedPrecisionPolicy\(param_dtype=",
        ),
        ({"cpu_offload": "yes"}, "cpu_offload='yes' must be True, False"),
        ({"state_dict_type": "local"}, "state_dict_type='local' must be 'sharded' or 'full'"),
        ({"use_orig_params": False}, "always keeps the model's own parameters"),
        ({"limit_all_gathers": False}, "limit_all_gathers=False"),
        ({"precision": None}, "precision is an argument of Runtime"),
        ({"cluster_environment": None}, "torchrun"),
        ({"activation_checkpointing": [Block]}, "another name: activation_checkpointing_policy"),
        ({"ignored_modules": []}, "is not supported"),
    ],
)
def test_what_has_no_meaning_here_is_refused_with_the_reason(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FSDPStrategy(**arguments)


def test_ddp_refuses_what_it_cannot_do_and_unknown_keywords_are_type_errors() -> None:
    with pytest.raises(ConfigurationError, match="process_group is not supported"):
        DDPStrategy(process_group=None)
    with pytest.raises(ConfigurationError, match="two names of one option"):
        DDPStrategy(sync_buffers=False, broadcast_buffers=False)
    for strategy in (DDPStrategy, FSDPStrategy):
        with pytest.raises(TypeError, match="unexpected keyword argument 'warp'"):
            strategy(warp={Block})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
        self.head = nn.Linear(4, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks[1](self.blocks[0](x)))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({nn.Sequential}, ["blocks.0", "blocks.1"]),
        (ModuleWrapPolicy({nn.Sequential}), ["blocks.0", "blocks.1"]),
        (
            functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={nn.Sequential}),
            ["blocks.0", "blocks.1"],
        ),
        (functools.partial(size_based_auto_wrap_policy, min_num_params=30), ["blocks.0", "blocks.1", "head"]),
        (CustomPolicy(lambda module: isinstance(module, nn.Linear) and module.out_features == 40), ["head"]),
        (lambda name, module: name == "blocks.1", ["blocks.1"]),
    ],
)
def test_torchs_policies_choose_the_modules_that_they_choose_for_fsdp1(
    policy: Callable[..., Any], expected: list[str]
) -> None:
    from nucleate.dimensions.sharding.wrap_policy import find_units

    assert sorted(name for name, _ in find_units(Model(), policy)) == expected


def test_a_policy_with_arguments_for_single_modules_is_refused() -> None:
    from nucleate.dimensions.sharding.wrap_policy import find_units

    def choose(module: nn.Module) -> bool | dict[str, bool]:
        return {"cpu_offload": True} if getattr(module, "out_features", 0) == 40 else False

    with pytest.raises(ConfigurationError, match=r"gives the module 'head' arguments of its own \(cpu_offload\)"):
        find_units(Model(), CustomPolicy(choose))
