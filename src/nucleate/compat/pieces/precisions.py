"""Fabric's precision classes: each makes the plugin of nucleate for the same arguments, and recognizes it.

Scripts call these classes with Fabric's arguments and compare `fabric.strategy.precision` with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nucleate.errors import PluginNotFoundError
from nucleate.registry import PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nucleate.precision.base import Precision


class _StandIn(type):
    """The type of classes that make objects of another class, and that count those as their own."""

    def __call__(cls, *arguments: Any, **keywords: Any) -> Any:
        return cls.make(*arguments, **keywords)  # type: ignore[attr-defined]

    def __instancecheck__(cls, instance: object) -> bool:
        try:
            return isinstance(instance, PRECISIONS.get(cls.registered))  # type: ignore[attr-defined]
        except PluginNotFoundError:
            return False


class BitsandbytesPrecision(metaclass=_StandIn):
    """Quantization by bitsandbytes; needs the package nucleate-bitsandbytes."""

    registered = "bnb-nf4"

    @staticmethod
    def make(mode: str, dtype: torch.dtype | None = None, ignore_modules: Iterable[str] | None = None) -> Any:
        """Make the precision.

        Args:
            mode: `"nf4"`, `"nf4-dq"`, `"fp4"`, `"fp4-dq"`, `"int8"` or `"int8-training"`.
            dtype: The dtype of products. None is float16 for the 8-bit modes and bfloat16 for the others.
            ignore_modules: Names of modules that keep their weights.
        """
        if dtype is None:
            dtype = torch.float16 if mode.startswith("int8") else torch.bfloat16
        skip = sorted(ignore_modules) if ignore_modules else None
        return PRECISIONS.get(BitsandbytesPrecision.registered)(mode, compute_dtype=dtype, skip=skip)  # type: ignore[call-arg]


class DoublePrecision(metaclass=_StandIn):
    """Everything in float64."""

    registered = "64-true"

    @staticmethod
    def make() -> Any:
        """Make the precision."""
        return PRECISIONS.create("64-true")


class HalfPrecision(metaclass=_StandIn):
    """Everything in bfloat16 or float16."""

    registered = "bf16-true"

    @staticmethod
    def make(precision: str = "16-true") -> Any:
        """Make the precision.

        Args:
            precision: `"bf16-true"` or `"16-true"`.
        """
        return PRECISIONS.get(HalfPrecision.registered).from_name(precision)


class MixedPrecision(metaclass=_StandIn):
    """Parameters in float32, and computation under autocast."""

    registered = "bf16-mixed"

    @staticmethod
    def make(precision: str, device: str, scaler: torch.amp.GradScaler | None = None) -> Precision:
        """Make the precision.

        Args:
            precision: `"16-mixed"` or `"bf16-mixed"`.
            device: The kind of device for autocast.
            scaler: A gradient scaler with other settings than torch's.
        """
        from nucleate.precision.mixed import MixedPrecision as Mixed

        return Mixed(Mixed.from_name(precision).compute_dtype, device, scaler)
