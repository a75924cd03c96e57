"""Metrics as numbers: tensors of one element are read, other tensors are refused by name."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nucleate.errors import UsageError, name_list


def refuse_unreadable(metrics: Any) -> None:
    """Refuse metrics that are not numbers by name, without reading a tensor: so this costs nothing on a device.

    Args:
        metrics: The argument of `log_dict`.

    Raises:
        UsageError: `metrics` is not a mapping from names, or a tensor in it is not one number.
    """
    if not isinstance(metrics, Mapping):
        raise UsageError(f"metrics are a dict from names to numbers, not {type(metrics).__name__}.")
    nameless = [repr(name) for name in metrics if not isinstance(name, str)]
    if nameless:
        raise UsageError(f"the name of a metric is a str, but these are not: {name_list(nameless)}.")
    for name, value in metrics.items():
        if isinstance(value, Tensor):
            _refuse(name, value)


def to_scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics with numbers in place of tensors and NumPy values of one element. Other values stay as they are.

    Args:
        metrics: Numbers by name.

    Raises:
        UsageError: See `refuse_unreadable`.
    """
    refuse_unreadable(metrics)
    return {name: _scalar(value) for name, value in metrics.items()}


def to_numbers(metrics: Mapping[str, Any], prefix: str, where: str) -> dict[str, int | float]:
    """Return metrics as plain numbers, with a prefix before each name.

    Args:
        metrics: Numbers by name.
        prefix: The text before each name; `-` joins it.
        where: The place that only takes numbers, for the message.

    Raises:
        UsageError: A value is not a number.
    """
    numbers = {}
    for name, value in to_scalars(metrics).items():
        if not isinstance(value, (int, float)):
            raise UsageError(f"metric {name!r} is {value!r:.200}, but {where} takes numbers only.")
        numbers[with_prefix(name, prefix)] = value
    return numbers


def with_prefix(name: str, prefix: str) -> str:
    """Return the name of a metric behind the prefix of a logger.

    >>> with_prefix("loss", "train"), with_prefix("loss", "")
    ('train-loss', 'loss')
    """
    return f"{prefix}-{name}" if prefix else name


def _refuse(name: str, tensor: Tensor) -> None:
    if _is_dtensor(tensor):
        raise UsageError(
            f"metric {name!r} is a DTensor, which several ranks hold together. Log `.full_tensor()`, which every rank "
            "calls."
        )
    if tensor.numel() != 1:
        raise UsageError(
            f"metric {name!r} is a tensor of shape {tuple(tensor.shape)}. A metric is one number: log its mean or "
            "another reduction, or each element under a name of its own."
        )
    if tensor.is_complex():
        raise UsageError(f"metric {name!r} is complex. Log its real and its imaginary part.")
    if tensor.is_meta:
        raise UsageError(f"metric {name!r} is a meta tensor, which has no value.")


def _scalar(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().item()
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.generic, numpy.ndarray)) and value.size == 1:
        return value.item()
    return value


def _is_dtensor(tensor: Tensor) -> bool:
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
