"""Recorded methods: methods of modules that write their module's tensors, and that users call outside the context.

Most scripts call `model.load_state_dict(...)` or `model.reset_parameters()`. While one of these methods runs, a guarded
tensor records the operations on it instead of refusing them. nucleate finds the method on the stack, because torch has
no hook around it and nucleate patches no class outside a context.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import Enum
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from nucleate.deferred.active import active_records
from nucleate.deferred.guards.handle import handle_of
from nucleate.errors import DeferredUseError


class Purpose(Enum):
    """The reason why a method writes tensors."""

    LOAD = "load"
    INITIALIZE = "initialize"


_PURPOSES = {
    "load_state_dict": Purpose.LOAD,
    "_load_from_state_dict": Purpose.LOAD,
    "reset_parameters": Purpose.INITIALIZE,
    "_reset_parameters": Purpose.INITIALIZE,
    "init_weights": Purpose.INITIALIZE,
    "_init_weights": Purpose.INITIALIZE,
}
_LOAD_ONE = nn.Module._load_from_state_dict.__code__


def running_purpose() -> Purpose | None:
    """Return the purpose of the innermost recorded method that this thread runs, or None outside such methods."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        purpose = _PURPOSES.get(code.co_name)
        if purpose is not None and code.co_argcount and isinstance(frame.f_locals.get(code.co_varnames[0]), nn.Module):
            return purpose
        frame = frame.f_back
    return None


def loading_frame() -> FrameType | None:
    """Return the frame of `nn.Module._load_from_state_dict` if it makes the current call on a tensor, or None."""
    frame = sys._getframe(2)
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
        frame = frame.f_back  # Also skip the frames of modes.
    return frame if frame.f_code is _LOAD_ONE else None


def refuse_meta_source(names: Mapping[str, Any]) -> None:
    """Refuse a state dict's tensor without a value, before torch copies it and collects one error for each tensor.

    Args:
        names: The local variables of `nn.Module._load_from_state_dict`.

    Raises:
        DeferredUseError: The tensor is on the meta device, and is not deferred.
    """
    value = names.get("input_param")
    if not isinstance(value, Tensor) or names["assign_to_params_buffers"] or handle_of(value) is not None:
        return
    with torch._C.DisableTorchFunction():
        is_meta = value.is_meta
    if is_meta and not any(record.tape.number(value) is not None for record in active_records()):
        raise DeferredUseError(
            f"{names.get('key')} cannot be loaded: its tensor in the state dict is on the meta device and has no "
            "value. Load a state dict whose tensors have values."
        )
