"""The strategies that names stand for."""

from __future__ import annotations

from typing import Any

import pytest

from nucleate import Runtime
from nucleate.errors import ConfigurationError, PluginNotFoundError
from nucleate.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from nucleate.strategies.choice import choose


@pytest.mark.parametrize(
    ("choice", "world_size", "expected"),
    [
        (None, 1, SingleDeviceStrategy),
        (None, 2, DDPStrategy),
        ("AUTO", 2, DDPStrategy),
        ("Single_Device", 1, SingleDeviceStrategy),
        ("DDP", 1, DDPStrategy),
        ("FSDP", 2, FSDPStrategy),
    ],
)
def test_a_name_may_be_in_upper_case_and_none_is_auto(choice: Any, world_size: int, expected: type) -> None:
    assert type(choose(choice, world_size)) is expected


def test_a_name_carries_an_option() -> None:
    assert choose("ddp_find_unused_parameters_true", 2).replicas.find_unused_parameters  # type: ignore[attr-defined]
    assert not choose("ddp_find_unused_parameters_false", 2).replicas.find_unused_parameters  # type: ignore[attr-defined]
    assert choose("fsdp_cpu_offload", 2).units.cpu_offload  # type: ignore[attr-defined]
    assert not choose("fsdp", 2).units.cpu_offload  # type: ignore[attr-defined]
    assert "fsdp_cpu_offload" in repr(Runtime(accelerator="cpu", strategy="fsdp_cpu_offload"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dp", r"strategy='dp' would run several devices.*strategy='ddp'"),
        ("deepspeed", "plugin for DeepSpeed, which does not exist yet.*'fsdp'"),
        ("deepspeed_stage_2_offload", "strategy='deepspeed_stage_2_offload' needs a plugin for DeepSpeed"),
        ("xla_fsdp", "plugin for XLA devices"),
        ("fsddp", "no strategy plugin named 'fsddp'. Did you mean 'fsdp'"),
    ],
)
def test_names_without_a_strategy_say_what_to_use(name: str, message: str) -> None:
    with pytest.raises(PluginNotFoundError, match=message):
        Runtime(accelerator="cpu", strategy=name)


def test_other_objects_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="neither a name nor a Strategy"):
        Runtime(accelerator="cpu", strategy=3)  # type: ignore[arg-type]
