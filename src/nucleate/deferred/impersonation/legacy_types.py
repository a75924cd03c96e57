"""Patches that make deferred tensors look like tensors of their device to C code of torch that no mode sees.

They cover the legacy tensor types and their `isinstance` checks, DLPack, the grouping of tensors by device, and the
question whether a mode is active.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from nucleate.deferred.active import active_record_of
from nucleate.deferred.tape.leaves import map_leaves
from nucleate.devices.kinds import legacy_types


def install_legacy(stack: ExitStack) -> None:
    """Patch torch until the stack is closed."""

    def patch(owner: Any, name: str, value: Any) -> None:
        stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    patch(torch.overrides, "has_torch_function", _has_own_torch_function)
    for owner in (torch, torch.utils.dlpack):
        patch(owner, "to_dlpack", _shares_memory(owner.to_dlpack))
    group = torch._C._group_tensors_by_device_and_dtype
    patch(torch._C, "_group_tensors_by_device_and_dtype", _groups(group))
    for namespace, name, kind in legacy_types(frozenset(_LEGACY)):
        patch(namespace, name, _stand_in(getattr(namespace, name), name, _LEGACY[name], kind))
    patch(torch, "set_default_tensor_type", _set_default_tensor_type(torch.set_default_tensor_type))


def _real(leaf: Any) -> Any:
    record = active_record_of(leaf)
    return leaf if record is None else record.value(leaf)


# -- questions about modes ---------------------------------------------------------------------------------


def _has_own_torch_function(relevant: Any) -> bool:
    """Return whether a tensor has its own torch function, or a mode is active that is not ours.

    torch also answers yes while our mode is active. Attention then takes a slower way that gives other last bits
    (torch/nn/modules/activation.py, 2.13).
    """
    if any(not getattr(mode, "is_impersonation", False) for mode in _get_current_function_mode_stack()):
        return True  # Eager construction under `torch.device(...)` gets the same answer.
    return any(
        hasattr(type(arg), "__torch_function__")
        and type(arg) is not Tensor
        and type(arg).__torch_function__ is not torch._C._disabled_torch_function_impl
        for arg in relevant
    )


# -- C functions -------------------------------------------------------------------------------------------


def _shares_memory(original: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def share(tensor: Tensor) -> Any:
        record = active_record_of(tensor)
        return original(tensor if record is None else record.expose(tensor))

    return share


def _groups(original: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
    """Group deferred tensors under their device, because optimizers and gradient clipping move tensors there."""

    def group(tensors: list[list[Tensor | None]], *args: Any, **kwargs: Any) -> dict[Any, Any]:
        groups = original(tensors, *args, **kwargs)
        record = next(filter(None, map(active_record_of, (tensor for each in tensors for tensor in each))), None)
        if record is None:
            return groups
        return {
            (record.device if device.type == "meta" else device, dtype): found
            for (device, dtype), found in groups.items()
        }

    return group


# -- legacy types ------------------------------------------------------------------------------------------

_LEGACY = {
    "FloatTensor": torch.float32, "DoubleTensor": torch.float64, "HalfTensor": torch.float16,
    "BFloat16Tensor": torch.bfloat16, "ByteTensor": torch.uint8, "CharTensor": torch.int8, "ShortTensor": torch.int16,
    "IntTensor": torch.int32, "LongTensor": torch.int64, "BoolTensor": torch.bool,
}  # fmt: skip


class _StandIn(type):
    """The metaclass of stand-ins for legacy types, which treat deferred tensors as tensors of their device."""

    original: Any
    dtype: torch.dtype
    device: str

    def __instancecheck__(cls, instance: Any) -> bool:
        record = active_record_of(instance)
        if record is None:
            return isinstance(instance, cls.original)
        return instance.dtype == cls.dtype and record.device.type == cls.device

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and active_record_of(args[0]) is not None and isinstance(args[0], cls):
            return torch.ops.aten.alias(args[0])
        # Not in tuples: a `torch.Size` is a tuple of lengths.
        values = (map_leaves(arg, _real) if isinstance(arg, (Tensor, list)) else arg for arg in args)
        return cls.original(*values, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.original, name)

    # A module that is imported meanwhile keeps the stand-in, so it must equal the original.
    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.original

    def __hash__(cls) -> int:
        return hash(cls.original)


def _stand_in(original: Any, name: str, dtype: torch.dtype, device: str) -> Any:
    return _StandIn(
        name, (), {"original": original, "dtype": dtype, "device": device, "__module__": original.__module__}
    )


def original_type(value: Any) -> Any:
    """Return the legacy type that a stand-in stands for, or any other value unchanged."""
    return value.original if isinstance(value, _StandIn) else value


def _set_default_tensor_type(original: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda kind: original(original_type(kind))
