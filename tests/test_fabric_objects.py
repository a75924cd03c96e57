"""Objects of Lightning Fabric where objects of nucleate must stand."""

from __future__ import annotations

from typing import Any

import pytest

from nucleate import Runtime
from nucleate.errors import ConfigurationError
from nucleate.fabric_objects import refuse_fabric_object


class Precision:
    """Stands for the class of Fabric with this name, so that the test needs no Fabric."""

    __module__ = "lightning.fabric.plugins.precision.precision"
    precision = "bf16-mixed"


class Strategy:
    __module__ = "lightning_fabric.strategies.strategy"


class Accelerator:
    __module__ = "lightning.fabric.accelerators.accelerator"


class Mine(Precision):
    precision = "16-mixed"


class Unknown:
    __module__ = "lightning.fabric.loops"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"precision": Precision()},
            r"Precision belongs to lightning.*Runtime\(precision='bf16-mixed'\)",
        ),
        ({"precision": Mine()}, r"Mine belongs to lightning.fabric.*Runtime\(precision='16-mixed'\)"),
        ({"strategy": Strategy()}, "Strategy belongs to lightning_fabric.*nucleate.strategies"),
        ({"accelerator": Accelerator()}, r"Accelerator belongs to lightning.*Runtime\(accelerator='gpu'\)"),
    ],
)
def test_each_argument_names_the_counterpart(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Runtime(**{"accelerator": "cpu", **arguments})


def test_an_object_without_a_counterpart_is_refused_and_other_objects_pass() -> None:
    with pytest.raises(ConfigurationError, match="no counterpart"):
        refuse_fabric_object(Unknown(), "plugins=...")
    refuse_fabric_object(object(), "plugins=...")


def test_real_objects_of_fabric_are_recognised() -> None:
    fabric = pytest.importorskip("lightning.fabric")
    from lightning.fabric.plugins import MixedPrecision, TorchCheckpointIO
    from lightning.fabric.plugins.environments import LightningEnvironment

    assert fabric
    for value, message in {
        MixedPrecision("bf16-mixed", "cpu"): "precision='bf16-mixed'",
        LightningEnvironment(): "torchrun",
        TorchCheckpointIO(): "Reader",
        fabric.strategies.DDPStrategy(): "DDPStrategy",
    }.items():
        with pytest.raises(ConfigurationError, match=message):
            refuse_fabric_object(value, "plugins=...")
