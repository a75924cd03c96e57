"""Recorded methods: methods of modules that write their module's tensors, and that users call outside the context.

`model.load_state_dict(...)` and `model.reset_parameters()` are lines that every script has. While one of these methods
runs, a guarded tensor records what is done to it instead of refusing it. The methods are found on the stack, since
torch has no hook around them and no class is patched outside a context.
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
    """Why a method writes tensors."""

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
    """Return the purpose of the innermost recorded method that this thread is in, or None outside of all."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        purpose = _PURPOSES.get(code.co_name)
        if purpose is not None and code.co_argcount and isinstance(frame.f_locals.get(code.co_varnames[0]), nn.Module):
            return purpose
        frame = frame.f_back
    return None


def loading_frame() -> FrameType | None:
    """Return the frame of `nn.Module._load_from_state_dict`, if that is who asks a tensor something."""
    frame = sys._getframe(2)
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
        frame = frame.f_back  # also those of modes
    return frame if frame.f_code is _LOAD_ONE else None


def refuse_meta_source(names: Mapping[str, Any]) -> None:
    """Refuse a state dict's tensor that has no value, before torch copies it and collects one error for each tensor.

    Args:
        names: The local names of `nn.Module._load_from_state_dict`.

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
            f"{names.get('key')} cannot be loaded: in the state dict it is on the meta device and has no value. Load a "
            "state dict with values."
        )
