"""Guarded tensors: deferred tensors between the constructor and `setup`, which refuse computation and edits.

When recording ends, each deferred tensor gets a guarded class. It is a subclass of the tensor's class that answers
questions about shape, dtype and device. Operations that change no value, such as a view, a cast or a copy, are recorded
at once. Operations that would compute with the tensor or write it raise an error with its FQN. Without the guard, an
edit would silently be lost, and a forward would silently return tensors without values. Inside another context the
guard steps aside, and the tensor's recording joins the open one. The class is changed in place (as torch does for
`UninitializedParameter`, torch/nn/parameter.py). It is restored before the tensor gets its value, so that no subclass
reaches autograd, FSDP or an optimizer's step.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nucleate.deferred.active import Recording, active_record, is_recording, turn
from nucleate.deferred.guards.assigned import note_assigned
from nucleate.deferred.guards.dispatch_check import DispatchCheck
from nucleate.deferred.guards.handle import Handle, attach, handle_of, is_shared, lifted
from nucleate.deferred.guards.recorded_methods import Purpose, loading_frame, refuse_meta_source, running_purpose
from nucleate.deferred.guards.refusals import (
    EDITS,
    REFUSED,
    is_edit,
    label,
    refuse,
    refuse_move,
    refuse_replication,
    refuse_shared,
    refuse_stale,
)
from nucleate.deferred.module_tensors import every_tensor
from nucleate.devices.kinds import legacy_kind, moves
from nucleate.errors import NucleateError

# Frequent questions, which the meta tensor itself answers correctly.
_PROPERTIES = ("shape", "dtype", "ndim", "layout", "requires_grad", "grad", "grad_fn", "is_leaf", "_version")
_QUESTIONS = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    Tensor.__hash__, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.size, Tensor.dim, Tensor.stride,
    Tensor.storage_offset, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex,
    torch.is_floating_point, torch.is_complex,
}  # fmt: skip
# Calls that `state_dict` makes on every tensor. They need no step and no dispatch check.
_ALIASES = {Tensor.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
# The effect of these, of `Tensor.cpu` and of similar methods depends on the device that the tensor stands for.
# `Impersonation` handles it.
_MOVES = {Tensor.to, Tensor.type}
# These make a real tensor with properties of a deferred one.
_LIKE = {
    torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like, torch.randint_like,
    Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor,
}  # fmt: skip
# Calls that `nn.Parameter(data)` makes on a tensor subclass.
_PARAMETER_CALLS = {Tensor.detach, Tensor.requires_grad_}
_IS_META = Tensor.is_meta.__get__  # type: ignore[attr-defined]
_DEVICE = Tensor.device.__get__
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def guard(tensor: Tensor, record: Recording, fqn: str) -> None:
    """Give a deferred tensor its guarded class."""
    if handle_of(tensor) is not None:
        return
    cls = type(tensor)
    attach(tensor, record, fqn, cls)
    if is_lazy(tensor):
        return  # It has no value to guard, and refuses calls itself.
    # A subclass with its own object layout keeps its class. It is still found by its handle.
    with suppress(TypeError):
        tensor.__class__ = _guarded_class(cls)


class Guarded:
    """The mixin in the class of a deferred tensor after its constructor."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Most calls are a question to one tensor.
        alone = len(args) == 1 and not kwargs and handle_of(args[0]) is not None
        found = args if alone else every_tensor((args, kwargs))
        guarded = [tensor for tensor in found if handle_of(tensor) is not None]
        if not guarded:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        answers = _handle(guarded[0]).record.answers
        if func in answers:
            if func == _IS_META and not is_recording() and (frame := loading_frame()) is not None:
                # torch asks this before it copies. It collects later errors, one for each tensor.
                _check_load(guarded[0], frame.f_locals)
            if func == _DEVICE and not is_recording():
                refuse_replication(_handle(guarded[0]))
            return answers[func]
        if func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _PARAMETER_CALLS and _is_called_by_parameter():
            return _for_parameter(guarded[0], func, args, kwargs)
        return _call(guarded, func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if is_shared(self, _handle(self)):  # type: ignore[arg-type]
            refuse_shared(_handle(self))  # type: ignore[arg-type]
        return _call([self], lambda: self.__deepcopy__(memo), impersonated=True)  # type: ignore[list-item]

    def __copy__(self) -> Any:
        return _call([self], lambda: _alias(self), impersonated=True)  # type: ignore[list-item]

    def __reduce_ex__(self, protocol: Any) -> Any:
        handle: Handle = _handle(self)  # type: ignore[arg-type]
        if active_record(handle.record.device) is None:
            refuse(handle, label(Tensor.__reduce_ex__), edit=False)
        return _call([self], lambda: self.__reduce_ex__(protocol), impersonated=True)  # type: ignore[list-item]

    @property
    def _is_param(self) -> bool:
        return bool(self.__dict__.get("_is_param", False))

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        # `nn.Parameter(data)` sets this on a tensor subclass. The class behind the guard may be one of torch's own.
        handle: Handle | None = handle_of(self)
        if handle is not None and handle.cls in (Tensor, nn.Parameter):
            attach(self, handle.record, handle.fqn, nn.Parameter)  # type: ignore[arg-type]
            self.__class__ = _guarded_class(nn.Parameter)  # type: ignore[assignment]
        else:
            self.__dict__["_is_param"] = value


def _call(
    guarded: list[Tensor],
    func: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    impersonated: bool = False,
) -> Any:
    """Call a function with guarded tensors. Inside a context they join its recording; outside, few calls are allowed.

    Args:
        guarded: The tensors among the arguments that are guarded.
        func: A torch function, or one of our own functions that copy.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        impersonated: Whether it is one of our own, which makes no call that must be refused.
    """
    kwargs = kwargs or {}
    handle = _handle(guarded[0])
    record = handle.record
    recording = active_record(record.device)
    if recording is not None:
        for tensor in guarded:
            recording.adopt_guarded(tensor)
        with recording.impersonating():
            return func(*args, **kwargs)
    if func is Tensor.__repr__ or func is Tensor.__format__:
        return _describe(guarded[0], handle)
    if func in _ALIASES and handle.cls in (Tensor, nn.Parameter):
        with torch._C.DisableTorchFunctionSubclass():
            alias = func(*args)
        guard(alias, record, handle.fqn)
        return alias
    purpose = running_purpose()
    if purpose is not None:
        return _record_call(guarded, func, args, kwargs, purpose)
    if func in REFUSED or func in EDITS:
        refuse(handle, label(func), edit=func in EDITS)
    if func in _LIKE:
        with lifted(guarded):
            return func(*args, **{"device": record.device, **kwargs})
    if func == _SET_DATA:
        return _set_data(*args)
    is_move = func in _MOVES or func in moves()
    if is_move:
        target = _target(func, args[1:], kwargs)
        if target is not None and not _same(target, record.device):
            refuse_move(handle, target)
    try:
        with ExitStack() as stack:
            stack.enter_context(lifted(guarded))
            if torch.is_inference_mode_enabled() != guarded[0].is_inference():
                # On the meta device inference tensors and others do not mix. `module.to` in inference mode mixes them.
                stack.enter_context(torch.inference_mode(guarded[0].is_inference()))
                stack.enter_context(torch.no_grad())
            stack.enter_context(record.reopened())
            if not impersonated:
                stack.enter_context(DispatchCheck(handle))
            if impersonated or is_move:
                stack.enter_context(record.impersonating())
            result = func(*args, **kwargs)
    except (RuntimeError, TypeError) as error:
        if impersonated or isinstance(error, NucleateError):
            raise
        # The call failed before it reached aten, such as an edit of a leaf that requires a gradient.
        refuse(handle, label(func), edit=is_edit(func), cause=error)
    _guard_result(result, handle)
    return result


def _record_call(
    guarded: list[Tensor], func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], purpose: Purpose
) -> Any:
    """Record a call that a method such as `load_state_dict` makes; see `recorded_methods.py`."""
    handle = _handle(guarded[0])
    record = handle.record
    # Before the checks, so that this thread waits for another one that records a call.
    with turn:
        for tensor in guarded:
            refuse_stale(tensor, _handle(tensor))
        if purpose is Purpose.LOAD and func is Tensor.copy_ and _copies_plainly(guarded, args, kwargs):
            with record.loading(), torch._C.DisableTorchFunction():
                given = record.given_by(args[0], args[1])
            if given is not None:
                record.bind(args[0], given)
                return args[0]
        num_steps = len(record.tape.steps)
        try:
            with lifted(guarded), record.reopened(), record.impersonating():
                if func is Tensor.copy_ and len(args) > 1 and not isinstance(args[1], Tensor):
                    # Before the library of a lazy tensor reads the whole tensor.
                    with record.factories(real=False):
                        lazy = record.of_lazy(args[1])
                    args = (args[0], args[1] if lazy is None else lazy, *args[2:])
                with record.loading() if purpose is Purpose.LOAD else nullcontext():
                    result = func(*args, **kwargs)
        finally:
            if any(step.position is not None for step in record.tape.steps[num_steps:]):
                record.settle()
        _guard_result(result, handle)
    return result


def _copies_plainly(guarded: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a `copy_` copies a plain tensor into a deferred one, as most copies of a state dict do."""
    if len(args) != 2 or kwargs or len(guarded) != 1 or type(args[1]) not in (Tensor, nn.Parameter):
        return False
    with torch._C.DisableTorchFunction():
        tracked = torch.is_grad_enabled() and (args[0].requires_grad or args[1].requires_grad)
        plain = not tracked and not torch.is_inference_mode_enabled() and not args[0].is_inference()
        return plain and not _handle(args[0]).record.is_exposed(args[0])


def _guard_result(result: Any, handle: Handle) -> None:
    """Guard the aliases and copies in a result. They are deferred like their originals."""
    for tensor in every_tensor(result):
        if handle_of(tensor) is None and handle.record.tape.number(tensor) is not None:
            guard(tensor, handle.record, handle.fqn)


def _check_load(target: Tensor, frame: Mapping[str, Any]) -> None:
    """Check a deferred tensor that `nn.Module._load_from_state_dict` is going to copy into or replace.

    Raises:
        DeferredError: The tensor of the state dict cannot be copied into the deferred tensor.
    """
    handle = _handle(target)
    if frame["assign_to_params_buffers"]:
        if isinstance(target, nn.Parameter):
            note_assigned(frame["self"], frame["name"], target)
        return
    refuse_stale(target, handle)
    refuse_meta_source(frame)


def _is_called_by_parameter() -> bool:
    frame = sys._getframe(1)
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
        frame = frame.f_back  # Also skip the frames of modes.
    return frame.f_code is nn.Parameter.__new__.__code__


def _for_parameter(tensor: Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Answer `nn.Parameter(tensor)`, which expects the same tensor subclass back (torch/nn/parameter.py, 2.13)."""
    handle = _handle(tensor)
    with lifted([tensor]):
        result: Tensor = func(*args, **kwargs)
    guard(result, handle.record, handle.fqn)
    result.__class__ = type(tensor)
    return result


def _set_data(target: Tensor, value: Tensor) -> None:
    if value is target:
        return
    handle, other = handle_of(target), handle_of(value)
    if handle is None:
        refuse(_handle(value), label(_SET_DATA), edit=False)
    if other is None or other.record.device != handle.record.device:
        refuse(handle, label(_SET_DATA), edit=True)
    with lifted((target, value)):
        target.data = value
    attach(target, other.record, handle.fqn, handle.cls)


def _alias(tensor: Any) -> Tensor:
    """Return another tensor on the same memory, as `copy.copy` does by way of `__reduce_ex__`."""
    if isinstance(tensor, nn.Parameter):
        alias: Tensor = nn.Parameter(tensor.data, tensor.requires_grad)
    else:
        alias = tensor.data.requires_grad_(tensor.requires_grad)
    alias.__dict__.update(tensor.__dict__)
    return alias


def _target(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """Return the target device of a move, or None if it names no device."""
    kind = moves().get(func)
    if kind == "cpu":
        return torch.device("cpu")
    if kind is not None:
        device = args[0] if args else kwargs.get("device")
        return torch.device(kind, device) if isinstance(device, int) else torch.device(device or kind)
    if func is Tensor.type:
        to = args[0] if args else kwargs.get("dtype")
        name = to if isinstance(to, str) else f"{getattr(to, '__module__', '')}.{getattr(to, '__name__', '')}"
        named = legacy_kind(name)
        return None if named is None else torch.device(named)
    other = kwargs.get("other", args[0] if args else None)
    if isinstance(other, Tensor):
        return other.device
    try:
        device, *_ = torch._C._nn._parse_to(*args, **kwargs)
    except (RuntimeError, TypeError):
        return None
    return device


def _same(device: torch.device, own: torch.device) -> bool:
    return device.type == own.type and (None in (device.index, own.index) or device.index == own.index)


def _handle(tensor: Tensor) -> Handle:
    handle = handle_of(tensor)
    assert handle is not None, "not a guarded tensor"
    return handle


def _describe(tensor: Tensor, handle: Handle) -> str:
    return f"{handle.cls.__name__}(deferred, shape={tuple(tensor.shape)}, dtype={tensor.dtype})"


@functools.cache
def _guarded_class(cls: type[Tensor]) -> type[Tensor]:
    return type(f"Deferred{cls.__name__}", (Guarded, cls), {})
