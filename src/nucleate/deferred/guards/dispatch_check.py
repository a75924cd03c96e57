"""The look-out over one call outside the context: it tells what changes no value from what uses or edits one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nucleate.deferred.guards.handle import Handle, is_shared
from nucleate.deferred.guards.refusals import refuse, refuse_shared
from nucleate.deferred.recording.op_schema import traits_of, written_by
from nucleate.deferred.tape.leaves import tensors

aten = torch.ops.aten

# Besides views. A cast is a function of the value alone, and what `model.to(dtype)` is made of; the last one is a
# question, which comes by here in inference mode.
_COPIES = {
    aten.clone.default, aten._to_copy.default, aten.detach.default, aten._unsafe_view.default,
    aten._has_compatible_shallow_copy_type.default,
}  # fmt: skip


class Lookout(TorchDispatchMode):
    """Lets through, to be recorded, what changes no value; refuses what reads or writes a deferred one.

    Args:
        handle: Of the tensor that is named where something is refused.
    """

    def __init__(self, handle: Handle) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.handle = handle

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see `Recorder`

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        number = self.handle.record.tape.number
        with torch._C.DisableTorchFunction():
            if any(number(tensor) is not None for tensor in tensors((args, kwargs))):
                name = func.overloadpacket.__name__
                if func._schema.is_mutable:
                    written = written_by(traits_of(func), args, kwargs)
                    refuse(self.handle, name, edit=any(number(tensor) is not None for tensor in written))
                if not func.is_view and func not in _COPIES:
                    refuse(self.handle, name, edit=False)
                if not func.is_view and func is not aten.detach.default:
                    self._refuse_shared((args, kwargs))
            return func(*args, **kwargs)

    def _refuse_shared(self, values: object) -> None:
        if any(is_shared(tensor, self.handle) for tensor in tensors(values)):
            refuse_shared(self.handle)
