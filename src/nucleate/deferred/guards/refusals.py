"""Refusals: the calls that a deferred tensor refuses outside the context, and the errors that it raises."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, NoReturn

from torch import Tensor, nn

from nucleate.deferred.guards.handle import Handle, staleness
from nucleate.errors import DeferredEditError, DeferredUseError

_SET_GRAD: Any = Tensor.grad.__set__  # type: ignore[union-attr]
#: Functions that would hand out memory, fail with a less clear error, or silently work on the meta tensor.
REFUSED = {
    Tensor.untyped_storage,
    Tensor.storage,
    Tensor.data_ptr,
    Tensor.numpy,
    Tensor.tolist,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.__dlpack_device__,
    Tensor.share_memory_,
    Tensor.__reduce_ex__,
}
#: Edits that do not reach aten, or do not reach it as edits.
EDITS = {
    Tensor.apply_,
    Tensor.map_,
    Tensor.map2_,
    _SET_GRAD,
}
_WRAPS = nn.parallel.DistributedDataParallel.__init__.__code__
_LABELS = {
    Tensor.data.__set__: "assigning its `.data`",  # type: ignore[attr-defined]
    _SET_GRAD: "assigning its `.grad`",
    Tensor.__setitem__: "assigning its elements",
    Tensor.__reduce_ex__: "pickling or saving it",
    Tensor.share_memory_: "sharing its memory",
}


def is_edit(func: Any) -> bool:
    """Return whether a torch function without a schema changes its first argument, judged by its name."""
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name not in _OPERATORS)
    return in_place or func is Tensor.__setitem__


_OPERATORS = {"__invert__", "__index__", "__int__", "__iter__"}


def label(func: Any) -> str:
    """Return the name of a torch function in error messages."""
    return _LABELS.get(func) or str(getattr(func, "__name__", func))


def refuse(handle: Handle, what: str, edit: bool, cause: Exception | None = None) -> NoReturn:
    """Raise the error for an edit or a use of a deferred tensor."""
    if edit:
        raise DeferredEditError(
            f"{handle.fqn} is deferred, and {what} would edit it outside the context that records it, so the edit "
            "would be lost. Do it in an `init_module(empty_init=True)` block (you can enter one again), or after "
            "`setup`."
        ) from cause
    raise DeferredUseError(
        f"{handle.fqn} is deferred and has no value yet, so {what} cannot work on it. Give the model its values first: "
        "call `runtime.setup(model)`, or `nucleate.materialize.materialize(model)` if you use no Runtime, or add the "
        "callback `nucleate_lightning.Materialize()` to Lightning's Trainer. Operations that a constructor could do "
        "also work in an `init_module(empty_init=True)` or `deferred()` block (you can enter one again)."
    ) from cause


def refuse_replication(handle: Handle) -> None:
    """Refuse a question about a tensor's device if `DistributedDataParallel` asks it while it wraps a model.

    torch then reads the tensors in C++, past their guards: it fails with an error about meta tensors, or wraps them
    without a value. Its constructor asks all parameters for their devices first (torch/nn/parallel/distributed.py,
    2.13). It asks in comprehensions, which have frames of their own before Python 3.12.
    """
    frame: FrameType | None = sys._getframe(2)
    for _ in range(2):
        if frame is not None:
            if frame.f_code is _WRAPS:
                refuse(handle, "DistributedDataParallel", edit=False)
            frame = frame.f_back


def refuse_edited(handle: Handle) -> NoReturn:
    """Raise the error for a deferred tensor with a write that nothing recorded."""
    raise DeferredEditError(
        f"{handle.fqn} was edited outside the context that records it, through a tensor that shares its memory, so "
        "the edit would be lost. Make the edit inside `init_module`, or after `setup`."
    )


def refuse_shared(handle: Handle) -> NoReturn:
    """Raise the error for a deferred tensor that shares its memory with a tensor that is materialized already."""
    raise DeferredUseError(
        f"{handle.fqn} is deferred, but shares its memory with a part of the model that is materialized already, so "
        "its recipe may no longer give its value. `materialize` it as well, or set up the whole model."
    )


def refuse_move(handle: Handle, device: Any) -> NoReturn:
    """Raise the error for a move of a deferred tensor to another device."""
    raise DeferredUseError(
        f"{handle.fqn} is deferred and stands for a tensor on {handle.record.device}, so it cannot be moved to "
        f"{device} before it has a value. Materialize it on the runtime's device with `runtime.setup(model)`, or on "
        "another device with `materialize(model, device)`."
    )


def refuse_stale(tensor: Tensor, handle: Handle) -> None:
    """Raise if a deferred tensor no longer matches its recording, or if another thread constructs its model."""
    found = staleness(tensor, handle)
    if found == "edited":
        refuse_edited(handle)
    if found == "shared":
        refuse_shared(handle)
    handle.record.refuse_other_thread()
