"""Between the constructor and `setup`: deferred tensors that refuse to be used or edited.

When recording ends, each deferred tensor that a module holds is given a guarded class, a subclass of its own
that answers questions about shape, dtype and device and raises on anything that would compute with it or
change it, by FQN. Without it such an edit would silently be lost, and a forward would silently return nothing.
The class is changed in place (as torch does for `UninitializedParameter`, torch/nn/parameter.py) and taken back
before the tensor gets its value, so that no subclass reaches autograd, FSDP or an optimizer's step.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from nucleate.deferred.tape import tensors
from nucleate.errors import DeferredEditError, DeferredUseError, NucleateError

if TYPE_CHECKING:
    from nucleate.deferred.context import Record

_HANDLE = "_nucleate_deferred"


@dataclass(frozen=True, slots=True)
class Handle:
    """What ties a deferred tensor to its record.

    Attributes:
        record: The record that can make its value.
        fqn: Its name, as far as it is known.
        cls: The class it had before it was guarded.
        version: Its version counter when it was guarded; a later one tells of an edit through an alias.
    """

    record: Record
    fqn: str
    cls: type[Tensor]
    version: int


class Guarded:
    """Mixed into the class of a deferred tensor that is out of its constructor."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handle = next(filter(None, map(handle_of, _every_tensor((args, kwargs)))), None)
        with torch._C.DisableTorchFunctionSubclass():
            if handle is None:
                return func(*args, **(kwargs or {}))
            if func in handle.record.answers:
                return handle.record.answers[func]
            if func in _REFUSED:
                _refuse(handle, getattr(func, "__name__", str(func)), edit=False)
            if func in _MOVES and _stays(handle.record.device, func, args, kwargs or {}):
                return args[0]
            if func == Tensor.data.__set__ and args[1] is args[0]:  # type: ignore[attr-defined]
                return None
            if func == Tensor.data.__set__:  # type: ignore[attr-defined]
                _refuse(handle, ".data =", edit=True)
            if func is Tensor.__repr__:
                return _describe(args[0], handle)
            try:
                with _Lookout(handle):
                    result = func(*args, **(kwargs or {}))
            except (RuntimeError, TypeError) as error:
                if isinstance(error, NucleateError):
                    raise
                # What fails before it reaches aten, such as `numpy()`.
                _refuse(handle, getattr(func, "__name__", str(func)), edit=False, cause=error)
            # An alias is as deferred as what it views.
            for tensor in _every_tensor(result):
                if handle_of(tensor) is None and handle.record.tape.number(tensor) is not None:
                    guard(tensor, handle.record, handle.fqn)
            return result


class _Lookout(TorchDispatchMode):
    """Lets views through and refuses what reads or writes a deferred value."""

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
            if func._schema.is_mutable:
                written = [
                    value
                    for index, argument in enumerate(func._schema.arguments)
                    if argument.alias_info is not None and argument.alias_info.is_write
                    for value in tensors(args[index] if index < len(args) else kwargs.get(argument.name))
                ]
                if any(number(tensor) is not None for tensor in written):
                    _refuse(self.handle, func.overloadpacket.__name__, edit=True)
            if not func.is_view and func is not torch.ops.aten.detach.default:
                _refuse(self.handle, func.overloadpacket.__name__, edit=False)
            return func(*args, **kwargs)


def handle_of(tensor: Any) -> Handle | None:
    """Return the handle of a guarded deferred tensor, or None for any other object."""
    return tensor.__dict__.get(_HANDLE) if isinstance(tensor, Tensor) else None


def guard(tensor: Tensor, record: Record, fqn: str) -> None:
    """Give a deferred tensor its guarded class."""
    if handle_of(tensor) is not None:
        return
    cls = type(tensor)
    with torch._C.DisableTorchFunction():
        version = 0 if tensor.is_inference() else tensor._version
    setattr(tensor, _HANDLE, Handle(record, fqn, cls, version))
    if is_lazy(tensor):
        return  # It has no value to guard, and refuses by itself.
    # A subclass with a layout of its own keeps its class, and is found by its handle all the same.
    with suppress(TypeError):
        tensor.__class__ = _guarded_class(cls)


def release(tensor: Tensor) -> None:
    """Take the guard off: the class as it was, and no handle."""
    handle = tensor.__dict__.pop(_HANDLE, None)
    if handle is not None:
        tensor.__class__ = handle.cls


def held_tensors(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the tensors that a module itself holds, as (kind, name, tensor).

    The kind is `"parameter"`, `"buffer"` or `"attribute"`; attributes are looked for in collections,
    dataclasses and namespaces too, in which the name is that of the attribute.
    """
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield "parameter", name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield "buffer", name, buffer
    for name, value in module.__dict__.items():
        if name not in ("_parameters", "_buffers", "_modules"):
            for tensor in _every_tensor(value):
                yield "attribute", name, tensor


def _every_tensor(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield the tensors in a value: a tensor, a collection of them, a dataclass or a namespace."""
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, (str, bytes, int, float, type(None), nn.Module)):
        return
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    if isinstance(value, Mapping):
        items: Iterable[Any] = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        items = value
    elif isinstance(value, SimpleNamespace) or (is_dataclass(value) and not isinstance(value, type)):
        items = list(vars(value).values()) if hasattr(value, "__dict__") else ()
    else:
        return
    seen.add(id(value))
    for item in items:
        yield from _every_tensor(item, seen)


@functools.cache
def _guarded_class(cls: type[Tensor]) -> type[Tensor]:
    return type(f"Deferred{cls.__name__}", (Guarded, cls), {})


# Copies and pickles of a recipe are not supported; these would fail in a less clear way, or not at all.
_REFUSED = {
    Tensor.__deepcopy__,
    nn.Parameter.__deepcopy__,
    Tensor.__reduce_ex__,
    nn.Parameter.__reduce_ex__,
    Tensor.untyped_storage,
    Tensor.storage,
    Tensor.apply_,
}
_MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}


def _stays(own: torch.device, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a call of `to`, `cpu` or `cuda` asks for what the tensor already is."""
    if func is Tensor.cpu:
        return own.type == "cpu"
    if func is Tensor.cuda:
        return own.type == "cuda" and len(args) == 1 and not kwargs
    try:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args[1:], **kwargs)
    except (RuntimeError, TypeError):
        return False
    same_device = device is None or (device.type == own.type and device.index in (None, own.index))
    return same_device and dtype in (None, args[0].dtype) and memory_format is None


def _describe(tensor: Tensor, handle: Handle) -> str:
    return f"{handle.cls.__name__}(deferred, shape={tuple(tensor.shape)}, dtype={tensor.dtype})"


def _refuse(handle: Handle, what: str, edit: bool, cause: Exception | None = None) -> NoReturn:
    if edit:
        raise DeferredEditError(
            f"{handle.fqn} is deferred, and {what} would edit it outside the context that records it, so the edit "
            "would be lost. Do it inside the `init_module` block that constructs it, or after `setup`."
        ) from cause
    raise DeferredUseError(
        f"{handle.fqn} is deferred and has no value yet, so {what} cannot work on it. Call `runtime.setup(model)` "
        "first, or do it inside the `init_module` block that constructs it."
    ) from cause
