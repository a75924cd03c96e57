"""The check of one call outside the context: it allows operations that change no value, and refuses the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nucleate.deferred.guards.handle import Handle, is_shared
from nucleate.deferred.guards.refusals import refuse, refuse_shared
from nucleate.deferred.recording.op_schema import schema_of, written_by
from nucleate.deferred.tape.leaves import tensors

aten = torch.ops.aten

# Operations that are allowed besides views. A cast depends on the value alone, and `model.to(dtype)` consists of casts.
# The last operation is a question, which gets here in inference mode.
_COPIES = {
    aten.clone.default, aten._to_copy.default, aten.detach.default, aten._unsafe_view.default,
    aten._has_compatible_shallow_copy_type.default,
}  # fmt: skip


class DispatchCheck(TorchDispatchMode):
    """The mode that passes operations to the recorder if they change no value, and refuses others on deferred tensors.

    Args:
        handle: The handle of the tensor that errors name.
    """

    def __init__(self, handle: Handle) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.handle = handle

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # See `Recorder`.

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        number = self.handle.record.tape.number
        with torch._C.DisableTorchFunction():
            if any(number(tensor) is not None for tensor in tensors((args, kwargs))):
                name = func.overloadpacket.__name__
                if func._schema.is_mutable:
                    written = written_by(schema_of(func), args, kwargs)
                    refuse(self.handle, name, edit=any(number(tensor) is not None for tensor in written))
                if not func.is_view and func not in _COPIES:
                    refuse(self.handle, name, edit=False)
                if not func.is_view and func is not aten.detach.default:
                    self._refuse_shared((args, kwargs))
            return func(*args, **kwargs)

    def _refuse_shared(self, values: object) -> None:
        if any(is_shared(tensor, self.handle) for tensor in tensors(values)):
            refuse_shared(self.handle)
