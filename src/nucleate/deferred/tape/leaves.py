"""Leaves: the tensors and plain values in the arguments and results of an operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_NO_TENSORS = frozenset((bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout))


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in the arguments or results of an aten operation, in order."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    # This runs several times for each operation, so the most frequent classes are checked first.
    kind = type(value)
    if kind in _NO_TENSORS:
        return
    if kind is tuple or kind is list:
        for item in value:
            if type(item) not in _NO_TENSORS:
                _collect(item, found)
    elif kind is dict:
        for item in value.values():
            if type(item) not in _NO_TENSORS:
                _collect(item, found)
    elif isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Rebuild lists, tuples and dicts, with every leaf passed through `change`."""
    kind = type(value)
    if kind in _NO_TENSORS:
        return change(value)
    if isinstance(value, (list, tuple)):
        items = [map_leaves(item, change) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: map_leaves(item, change) for key, item in value.items()}
    return change(value)
