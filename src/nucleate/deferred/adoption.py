"""Adoption: tensors that other code made on the meta device become deferred tensors without a value.

The tensor stays the same object on the same storage, so that ties, views and optimizers stay valid. The storage gets a
number on a tape. Operations on the tensor in a context are then recorded as if the constructor had left it empty.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from nucleate.deferred.guards.guarded import guard
from nucleate.deferred.guards.handle import handle_of, release
from nucleate.deferred.record import Record, record_of
from nucleate.deferred.tape.steps import TensorRef
from nucleate.deferred.tape.tape import Tape

aten = torch.ops.aten


def is_adoptable(tensor: Tensor) -> bool:
    """Return whether a tensor is on the meta device, belongs to no recording, and is a plain view of one storage."""
    with torch._C.DisableTorchFunctionSubclass():
        if not tensor.is_meta or handle_of(tensor) is not None or tensor.layout != torch.strided or is_lazy(tensor):
            return False
        return not is_traceable_wrapper_subclass(tensor) and record_of(tensor) is None


def adopt(named: Iterable[tuple[str, Tensor]], device: torch.device) -> Record | None:
    """Make meta tensors deferred tensors of a device that have no value yet.

    Args:
        named: Names and adoptable tensors. Several tensors may be one object or share a storage.
        device: The device that they stand for.

    Returns:
        Their recording, or None without tensors. It lives as long as one of them is deferred.
    """
    record: Record | None = None
    for fqn, tensor in named:
        record = record or Record(device)
        with torch._C.DisableTorchFunctionSubclass(), _disable_current_modes():
            if record.tape.number(tensor) is None:
                _append_empty(record.tape, tensor, device)
        guard(tensor, record, fqn)
    return record


def abandon(tensors: Iterable[Tensor]) -> None:
    """Make adopted tensors plain meta tensors again."""
    for tensor in tensors:
        handle = handle_of(tensor)
        if handle is not None:
            handle.record.tape.forget(tensor)
            release(tensor)


def _append_empty(tape: Tape, tensor: Tensor, device: torch.device) -> None:
    """Append the step that makes uninitialized memory for the storage of a tensor."""
    number = tape.add_storage(tensor)
    size_bytes = tape.size_bytes(number)
    ref = tape.ref(tensor)
    if not ref.fills(size_bytes):
        # The tensor is a view of a larger storage.
        ref = TensorRef(number, torch.uint8, (size_bytes,), (1,), 0, False, False)
    step = tape.step(
        aten.empty_strided.default,
        (list(ref.size), list(ref.stride)),
        {"dtype": ref.dtype, "device": device},
        outputs=(ref,),
        creates=(number,),
        uninitialized=True,
    )
    tape.append(step)
