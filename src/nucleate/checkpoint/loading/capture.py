"""A mode that notes the copies of a module into its tensors while it loads, and leaves these tensors unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from nucleate.deferred import record_of
from nucleate.deferred.guards import is_edit
from nucleate.deferred.tape import is_written
from nucleate.errors import CheckpointError

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
# These functions write every element and read none.
_CONSTANTS = {Tensor.zero_, Tensor.fill_}


class UnplannedWriteError(CheckpointError):
    """A module writes its tensors in a way that cannot be planned."""


class Capture(TorchFunctionMode):
    """A mode that notes copies into a module's tensors instead of making them.

    Args:
        root: The module that loads.

    Attributes:
        module: The module whose own code runs.
        prefix: The beginning of that module's names in the root.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.module = root
        self.prefix = ""
        self._tensors: dict[str, Tensor] = {
            **dict(root.named_parameters(remove_duplicate=False)),
            **dict(root.named_buffers(remove_duplicate=False)),
        }
        self._names: dict[int, list[str]] = {}
        self._by_memory: dict[int, list[str]] = {}
        for name, tensor in self._tensors.items():
            self._names.setdefault(id(tensor), []).append(name)
            self._by_memory.setdefault(_memory(tensor), []).append(name)
        # These keep the memory, so that no other tensor gets it meanwhile.
        self._storages = [tensor.detach() for tensor in self._tensors.values() if not is_lazy(tensor)]
        self._taken: dict[str, tuple[Tensor, Any]] = {}
        # The values of tensors that are written part by part.
        self._parts: dict[str, Tensor] = {}

    def taken(self) -> dict[str, tuple[Tensor, Any]]:
        """Return the tensors written since the last call and their new values, by the name inside the root.

        Raises:
            UnplannedWriteError: A part of a tensor was written, and the rest was not.
        """
        for name, made in self._parts.items():
            record = record_of(made)
            if record is None or not is_written(record.tape, record.tape.ref(made)):
                raise self._error(name, "writing only a part")
        taken, self._taken, self._parts = self._taken, {}, {}
        return taken

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else None
        if isinstance(target, Tensor) and (is_edit(func) or func == _SET_DATA):
            names = self._names.get(id(target)) or self._by_memory.get(_memory(target))
            # A lazy parameter gets its shape by such an assignment.
            if names is not None and not (func == _SET_DATA and is_lazy(target)):
                return self._write(func, target, names, args, kwargs)
        return func(*args, **kwargs)

    def _write(self, func: Any, target: Tensor, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        here = self.prefix.removesuffix(".")
        name = next((name for name in names if name.rpartition(".")[0] == here), names[0])
        whole = self._tensors[name]
        with torch._C.DisableTorchFunction():
            is_whole = (target.size(), target.stride()) == (whole.size(), whole.stride())
            size, stride = tuple(target.size()), target.stride()
            offset = int(target.storage_offset()) - int(whole.storage_offset())
        value = self._value(func, target, args, kwargs)
        if value is None or (not is_whole and func == _SET_DATA):
            raise self._error(name, getattr(func, "__name__", str(func)))
        if not is_whole:
            made = self._parts.get(name)
            if made is None:
                made = self._parts[name] = torch.empty(whole.shape, dtype=whole.dtype, device="cpu")
            with torch.no_grad():
                made.as_strided(size, stride, offset).copy_(value)
            value = made
        self._taken[name] = (whole, value)
        return target

    def _error(self, name: str, what: str) -> UnplannedWriteError:
        return UnplannedWriteError(
            f"{type(self.module).__name__} ({self.prefix.removesuffix('.') or 'the model'}) writes {name} by {what} "
            "while it loads, so the result depends on the tensor's present values. `load_raw` and `load` plan their "
            "reads, and cannot run such code. Set the model up, and pass the result of `runtime.load(path)` to "
            "`model.load_state_dict`."
        )

    def _value(self, func: Any, target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the target's value after the write, or None if it depends on the present value."""
        if func in _CONSTANTS:
            made: Tensor = func(torch.empty(target.shape, dtype=target.dtype, device="cpu"), *args[1:], **kwargs)
            return made
        value = args[1] if len(args) > 1 else kwargs.get("src")
        if func == _SET_DATA:
            return value if isinstance(value, Tensor) and value.shape == target.shape else None
        if func is not Tensor.copy_:
            return None
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value, device="cpu")
        if not value.dtype.is_floating_point and target.dtype.is_floating_point:
            value = value.to(target.dtype)
        return value if value.shape == target.shape else value.expand(target.shape)


def _memory(tensor: Tensor) -> int:
    """Return a number that is equal for tensors that share memory."""
    with torch._C.DisableTorchFunction():
        try:
            return int(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError, ValueError):
            return id(tensor)  # a subclass without memory, or a lazy tensor
