"""The arguments of `from_pretrained` that split a model, held against the mesh of the strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers as hf
from transformers.distributed import DistributedConfig

from nucleate import Runtime, Strategy
from nucleate.dimensions import FullyShard, TensorParallel
from nucleate.errors import ConfigurationError
from nucleate.strategies import DDPStrategy, FSDPStrategy, Parallel, SingleDeviceStrategy
from nucleate_transformers import TransformersIntegration
from nucleate_transformers.parallel_arguments import ParallelArguments

WORDS = {"model.layers.*.mlp.up_proj": "colwise", "model.layers.*.mlp.down_proj": "rowwise"}


def two_by_two(plan: Any = "auto") -> Strategy:
    return Parallel(mesh={"dp_shard": -1, "tp": 2}, dimensions=[FullyShard(), TensorParallel(plan)])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"tp_plan": "auto"},
        {"tp_plan": "auto", "tp_size": 2},
        {"tp_size": 2},
        {"tp_plan": {"lm_head": "colwise_gather_output"}},
        {"distributed_config": {"tp_plan": "auto"}},
        {"distributed_config": DistributedConfig(tp_size=2)},
        {"distributed_config": DistributedConfig(tp_size=2, fsdp_size=2)},
        {"distributed_config": {"tp_size": 2, "fsdp_size": 2, "dp_replicate_size": 1, "fsdp_cpu_offload": False}},
    ],
)
def test_arguments_that_say_the_mesh_are_taken(arguments: dict[str, Any]) -> None:
    ParallelArguments(two_by_two(), 4, arguments)


@pytest.mark.parametrize(
    ("strategy", "arguments", "message"),
    [
        (two_by_two(), {"tp_size": 4}, r"tp_size=4\) .*dp_shard=2 x tp=2.*Runtime\(strategy='fsdp\+tp=4'\)"),
        (two_by_two(), {"tp_size": 1}, r"tp_size=1\) .*strategy='fsdp'"),
        (two_by_two(), {"distributed_config": DistributedConfig(tp_size=2, fsdp_size=4)}, "fsdp_size=4"),
        (two_by_two(), {"distributed_config": {"dp_replicate_size": 2}}, r"strategy='fsdp\+dp_replicate=2\+tp=2'"),
        (two_by_two(), {"distributed_config": DistributedConfig(tp_size=2, pp_size=2)}, "pp_size=2.*no axis for it"),
        (two_by_two(), {"distributed_config": {"tp_size": 2, "ep_size": 2}}, "ep_size=2.*no axis for it"),
        (two_by_two(), {"distributed_config": {"fsdp_cpu_offload": True}}, r"FullyShard\(cpu_offload=True\)"),
        (two_by_two(), {"distributed_config": {"tp_sizes": 2}}, r"unknown fields \['tp_sizes'\]"),
        (two_by_two(), {"distributed_config": 2}, "neither a DistributedConfig nor a dict"),
        (two_by_two(), {"distributed_config": {}, "tp_size": 2}, "distributed_config and tp_size. Give one"),
        (two_by_two(), {"tp_plan": {}}, r"tp_plan=\{\}.*Give 'auto', or rules"),
        (two_by_two(), {"tp_plan": "all"}, "tp_plan='all'.*Give 'auto', or rules"),
        (two_by_two(WORDS), {"tp_plan": "auto"}, r"TensorParallel\(2 patterns\) with a plan of its own"),
        (FSDPStrategy(), {"tp_plan": "auto"}, r"tp_plan='auto'.*'fsdp'.*strategy='fsdp\+tp=2'"),
        (DDPStrategy(), {"tp_plan": "auto"}, r"'ddp'.*strategy='ddp\+tp=2'"),
        (SingleDeviceStrategy(), {"tp_size": 2}, r"does not split models.*strategy='tp=2'"),
    ],
)
def test_arguments_that_contradict_the_mesh_are_refused_with_a_strategy_that_fits(
    strategy: Strategy, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ParallelArguments(strategy, 4, arguments)


@pytest.mark.parametrize("name", ["tp_plan", "tp_size", "distributed_config", "device_mesh"])
def test_from_config_says_that_the_axis_of_the_strategy_splits(name: str) -> None:
    runtime = Runtime(accelerator="cpu", strategy="single_device", plugins=[TransformersIntegration()])
    with runtime.init_module(empty_init=True):
        with pytest.raises(ConfigurationError, match=rf"from_config takes no {name}.*'fsdp\+tp=2'"):
            hf.AutoModelForCausalLM.from_config(tiny.config_of("llama"), **{name: 2})


def test_sizes_of_one_split_nothing_and_are_taken_without_an_axis(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    runtime = Runtime(accelerator="cpu", strategy="single_device", plugins=[TransformersIntegration()])
    with runtime.init_module(empty_init=True):
        model, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path, tp_size=1, output_loading_info=True)
    assert not any(info.values())
    tiny.assert_same(runtime.setup(model).eval(), hf.AutoModelForCausalLM.from_pretrained(tmp_path))
