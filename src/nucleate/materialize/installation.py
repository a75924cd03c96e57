"""Installation: a value takes the place of a model's tensor, for every reference to the tensor if possible."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from nucleate.materialize.handover import swap, unmark_released
from nucleate.materialize.plan import Holder


def install(tensor: Tensor, cls: type[Tensor], holders: Iterable[Holder], value: Tensor) -> None:
    """Give a tensor its value and keep the object. Where torch refuses that, replace the object.

    Args:
        tensor: The tensor.
        cls: The class that it has afterwards.
        holders: All places of the model that hold it.
        value: A plain tensor with the value.
    """
    if isinstance(tensor, nn.Parameter):
        real: Tensor = nn.Parameter(value, requires_grad=tensor.requires_grad)
    else:
        real = value.requires_grad_(tensor.requires_grad) if tensor.is_leaf else value
    real.__class__ = cls
    unmark_released(tensor)
    real.__dict__.update(tensor.__dict__)
    try:
        swap(tensor, real)
    except RuntimeError:
        # A weak reference or autograd holds the tensor. The next best way is to replace it in all places of the model.
        for holder in holders:
            _replace(holder, tensor, real)


def _replace(holder: Holder, old: Tensor, new: Tensor) -> None:
    if holder.kind == "parameter":
        holder.module._parameters[holder.name] = new  # type: ignore[assignment]
    elif holder.kind == "buffer":
        holder.module._buffers[holder.name] = new
    else:
        value = holder.module.__dict__[holder.name]
        holder.module.__dict__[holder.name] = _replaced(value, old, new)


def _replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    if value is old:
        return new
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, old, new) for item in value)
    if type(value) is dict:
        return {key: _replaced(item, old, new) for key, item in value.items()}
    return value
