"""The torch function mode for deferred tensors: Python sees them on the device that they will live on, never on meta.

torch and other libraries behave differently on meta tensors. `nn.init.trunc_normal_`, `orthogonal_`, `sparse_` and
`dirac_` return without doing anything (torch/nn/init.py, since 2.12). transformers skips its whole weight
initialization. So while a constructor runs, `device`, `is_meta` and similar attributes answer for the intended device.
The same mode catches calls that never reach aten: host reads of a whole tensor, and `.data =` between a real and a
deferred tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
)

from nucleate.deferred.active import turn
from nucleate.deferred.guards.recorded_methods import loading_frame, refuse_meta_source
from nucleate.deferred.impersonation.absent_devices import FROM_DATA, absent_as_meta, is_factory
from nucleate.deferred.impersonation.deepcopy import deepcopy
from nucleate.deferred.impersonation.legacy_types import original_type
from nucleate.deferred.impersonation.whole_functions import call_whole, is_whole
from nucleate.deferred.onset import FACTORY, Onset
from nucleate.deferred.recording.meta_shapes import is_plain
from nucleate.deferred.recording.recorder import Recorder
from nucleate.deferred.tape.leaves import map_leaves, tensors
from nucleate.devices import concrete, is_present
from nucleate.devices.kinds import moves, questions

Handler = Callable[..., Any]

_IS_META = Tensor.is_meta.__get__  # type: ignore[attr-defined]


class Impersonation(TorchFunctionMode):
    """The torch function mode that makes deferred tensors look like tensors of the recorder's device.

    Args:
        recorder: The recorder, which knows the deferred tensors and records operations on them.
    """

    #: Marks this mode among the modes of torch.
    is_impersonation = True

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self._moves = moves()
        device = recorder.device
        index = device.index if device.index is not None else -1
        self.answers: dict[Any, Any] = {
            Tensor.device.__get__: device,
            Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
            **{question: kind == device.type for question, kind in questions().items()},
            Tensor.get_device: index,
        }

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.recorder.is_on:
            onset = self.recorder.onset
            return func(*args, **kwargs) if onset is None else self._wait(onset, func, args, kwargs)
        if func in self.answers and self._is_deferred(args[0]):
            if func == _IS_META and (frame := loading_frame()) is not None:
                refuse_meta_source(frame.f_locals)
            return self.answers[func]
        if not self.recorder.is_present and (meant := absent_as_meta(func, args, kwargs, self.recorder.device)):
            with self._impersonated_target():
                return self._made_for_absent(func, *meant)
        handler = _HANDLERS.get(func)
        if handler is None and func in self._moves:
            handler = Impersonation._move
        if handler is not None:
            with turn:
                return handler(self, func, args, kwargs)
        if "device" in kwargs and _is_meta_device(kwargs["device"]):
            with self._meta_is_meant():
                return func(*args, **kwargs)
        if "out" in kwargs and is_factory(func) and self._is_deferred(kwargs["out"]):
            return self._fill_out(func, args, kwargs)
        if is_whole(func, args, kwargs, self.recorder.device) and any(map(self._is_deferred, tensors((args, kwargs)))):
            return call_whole(self.recorder, func, args, kwargs)
        if getattr(func, "__name__", "").startswith("linalg_"):
            return self._compute(func, args, kwargs)
        return func(*args, **kwargs)

    def _wait(self, onset: Onset, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function before the recording has begun. A call of `torch.empty` may begin it."""
        if func is FACTORY:
            with onset.asked():
                return func(*args, **kwargs)
        if func is Tensor.type:
            args, kwargs = tuple(map(original_type, args)), {k: original_type(value) for k, value in kwargs.items()}
        if _get_current_dispatch_mode() is not self.recorder:
            return func(*args, **kwargs)
        # This is faster. Also, torch computes some functions in another way while a dispatch mode is active.
        with _pop_mode_temporarily():
            return func(*args, **kwargs)

    def _is_deferred(self, value: Any) -> bool:
        return isinstance(value, Tensor) and self.recorder.tape.number(value) is not None

    def _fill_out(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let a factory write into a deferred tensor: torch compares its `device` argument with the tensor's device."""
        told = kwargs.get("device")
        if told is not None and not _same_device(told, self.recorder.device):
            return func(*args, **kwargs)  # torch refuses the call.
        with self._impersonated_target():
            return func(*args, **{**kwargs, "device": torch.device("meta")})

    @contextmanager
    def _meta_is_meant(self) -> Iterator[None]:
        before = self.recorder.meta_is_meant
        self.recorder.meta_is_meant = True
        try:
            yield
        finally:
            self.recorder.meta_is_meant = before

    def _on_value(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer from the present value of the tensor."""
        if self._is_deferred(args[0]):
            args = (self.recorder.value(args[0]), *args[1:])
        else:
            self.recorder.states.settle(args[0])
        return func(*args, **kwargs)

    def _share(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand out memory that the caller may write. From here on, this memory holds the tensor's value."""
        tensor = args[0]
        if self._is_deferred(tensor):
            args = (self.recorder.expose(tensor).requires_grad_(tensor.requires_grad), *args[1:])
        else:
            self.recorder.states.settle(tensor)
        return func(*args, **kwargs)

    def _change(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function on real memory, because no mode sees how it changes the tensor."""
        target = args[0]
        if not self._is_deferred(target):
            return func(*map_leaves(args, self._real), **kwargs)
        result = func(self.recorder.expose(target), *map_leaves(args[1:], self._real), **kwargs)
        return target if isinstance(result, Tensor) else result

    def _real(self, leaf: Any) -> Any:
        return self.recorder.value(leaf) if self._is_deferred(leaf) else leaf

    def _show(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the text that torch would print for the value, with `requires_grad` or the tensor's `grad_fn`."""
        tensor = args[0]
        if not self._is_deferred(tensor):
            return self._on_value(func, args, kwargs)
        real = self.recorder.value(tensor)
        if tensor.grad_fn is None:
            return func(real.requires_grad_(tensor.requires_grad), *args[1:], **kwargs)
        text, suffix = func(real, *args[1:], **kwargs), f"grad_fn=<{type(tensor.grad_fn).__name__}>)"
        # The same as `_add_suffixes` in torch/_tensor_str.py (2.13).
        width = len(text) - text.rfind("\n") + len(suffix) + 1
        separator = ",\n       " if width > torch._tensor_str.PRINT_OPTS.linewidth else ", "
        return f"{text[:-1]}{separator}{suffix}"

    def _reduce(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pickle a tensor with its value. Tensors that share memory also share it in the pickle."""
        tensor = args[0]
        if not self._is_deferred(tensor):
            return func(*args, **kwargs)
        real = self.recorder.expose(tensor).requires_grad_(tensor.requires_grad)
        real.__class__ = type(tensor)
        real.__dict__.update(tensor.__dict__)
        return func(real, *args[1:], **kwargs)

    def _index(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Turn lists in an index into real tensors. torch would turn them into meta tensors without values."""
        if self._is_deferred(args[0]):
            index = args[1]
            parts = index if isinstance(index, tuple) else (index,)
            parts = tuple(
                torch.tensor(part) if isinstance(part, (list, range)) and _is_list_of_numbers(part) else part
                for part in parts
            )
            args = (args[0], parts if isinstance(index, tuple) else parts[0], *args[2:])
        return func(*args, **kwargs)

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function with tensors that are all deferred or all real.

        torch makes further tensors inside the call, and compares the devices of all.
        """
        given = tensors((args, kwargs))
        if kwargs.get("out") is not None:
            return func(*args, **kwargs)
        if any(map(self._is_deferred, given)):
            return func(*map_leaves(args, self._deferred), **map_leaves(kwargs, self._deferred))
        before, self.recorder.makes_real = self.recorder.makes_real, True
        try:
            return func(*args, **kwargs)
        finally:
            self.recorder.makes_real = before

    def _deferred(self, leaf: Any) -> Any:
        is_real = isinstance(leaf, Tensor) and is_plain(leaf) and not leaf.is_meta and not leaf.requires_grad
        return self.recorder.adopt(leaf) if is_real else leaf

    def _split(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Split a tensor. torch reads the split positions, so this replaces deferred positions by their values."""
        args = (*args[:1], *map(self._real, args[1:]))
        return func(*args, **{name: self._real(value) for name, value in kwargs.items()})

    def _get_data(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Remember the alias. It has its own version counter, so later checks would not see an edit through it."""
        alias = func(*args, **kwargs)
        if self._is_deferred(alias) and alias is not args[0]:
            self.recorder.handed_out.append(weakref.ref(alias))
        return alias

    def _deepcopy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Copy a leaf by the rules of its device. torch copies meta tensors by other rules."""
        if type(args[0]) is not Tensor or not args[0].is_leaf or not self._is_deferred(args[0]):
            return func(*args, **kwargs)
        return deepcopy(*args, **kwargs)

    def _new_tensor(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a real constant with the dtype and device of a tensor."""
        if not self._is_deferred(args[0]):
            return func(*args, **kwargs)
        options = {"dtype": args[0].dtype, "device": self.recorder.device, **kwargs}
        return self._construct(torch.tensor, args[1:], options)

    def _set_data(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target, value = args
        if self._is_deferred(target) and isinstance(value, Tensor) and not value.is_meta:
            if value.device.type != self.recorder.device.type and self.recorder.is_present:
                # torch allows this between some devices. For the others, this call raises torch's error.
                func(torch.empty(0, dtype=value.dtype, device=self.recorder.device), value)
            return func(target, self.recorder.adopt(value))
        if not self._is_deferred(target) and self._is_deferred(value):
            return func(target, self.recorder.expose(value))
        return func(target, value)

    def _move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Move a tensor. Like eager torch, return the tensor itself if it is already on the target device."""
        other = kwargs.get("other", args[1] if len(args) > 1 else None)
        if isinstance(other, Tensor):
            # torch would read the meta device from a deferred tensor.
            device = self.recorder.device if self._is_deferred(other) else other.device
            args = (args[0], device, other.dtype, *args[2:])
            kwargs = {name: value for name, value in kwargs.items() if name != "other"}
        if any(_is_meta_device(arg) for arg in (*args[1:], *kwargs.values())):
            with self._meta_is_meant():
                if self._is_deferred(args[0]):
                    return self._to_meta(args[0], args[1:], kwargs)
                return func(*args, **kwargs)
        own = self.recorder.device
        if not self._is_deferred(args[0]):
            return func(*args, **kwargs) if self.recorder.is_present else self._move_to_absent(func, args, kwargs)
        kind = self._moves.get(func)
        if kind == "cpu":
            return args[0] if own.type == "cpu" else func(*args, **kwargs)
        if kind is not None:
            target = kwargs.get("device", args[1] if len(args) > 1 else None)
            if isinstance(target, int):
                target = torch.device(kind, target)
            same = own.type == kind and (target is None or _same_device(target, own))
            return args[0] if same else func(*args, **kwargs)
        return self._move_as_meta(func, args, kwargs)

    def _move_as_meta(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        there = torch.device("meta")

        def here(leaf: Any) -> Any:
            is_device = isinstance(leaf, (str, torch.device))
            return there if is_device and _same_device(leaf, self.recorder.device) else leaf

        with self._impersonated_target():
            moved = func(args[0], *map(here, args[1:]), **{name: here(value) for name, value in kwargs.items()})
        # torch does not know that the CPU with an index is the CPU, and copies.
        copies = moved is args[0] and any(_is_indexed_cpu(arg) for arg in (*args[1:], *kwargs.values()))
        return moved.clone() if copies else moved

    def _move_to_absent(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the move of a real tensor to a device that this machine does not have."""
        if func.__name__ != self.recorder.device.type:
            return self._move_as_meta(func, args, kwargs)
        device = torch.device(self.recorder.device.type, self.recorder.device.index)
        return self._move_as_meta(Tensor.to, (args[0], device), {})

    def _made_for_absent(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a tensor for a device that this machine does not have. The meta device stands for that device."""
        if func not in FROM_DATA:
            return func(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
        value = self._construct(func, args, {**kwargs, "device": "cpu"})
        moved: Tensor = torch.ops.aten._to_copy(value, device=torch.device("meta"))
        return moved.requires_grad_(value.requires_grad)

    @contextmanager
    def _impersonated_target(self) -> Iterator[None]:
        before = self.recorder.meta_is_meant
        self.recorder.meta_is_meant = False
        try:
            yield
        finally:
            self.recorder.meta_is_meant = before

    def _type(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args = tuple(map(original_type, args))
        kwargs = {name: original_type(value) for name, value in kwargs.items()}
        if not self._is_deferred(args[0]):
            return func(*args, **kwargs)
        if len(args) == 1 and not kwargs:
            return _type_name(args[0].dtype, self.recorder.device)
        target = args[1] if len(args) > 1 else kwargs.get("dtype")
        if not isinstance(target, torch.dtype):
            # The target is a legacy type or its name. A real tensor can resolve both.
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                empty: Any = torch.empty(0, device=self.recorder.device).type(target)
            if empty.device.type != self.recorder.device.type:
                return func(*args, **kwargs)
            target = empty.dtype
        return args[0] if target == args[0].dtype else args[0].to(target)

    def _new(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a tensor from sizes, numbers or a tensor, with the type of the first argument."""
        if not self._is_deferred(args[0]) or len(args) < 2:
            return func(*args, **kwargs)
        if isinstance(args[1], (list, tuple)) and not isinstance(args[1], torch.Size):
            return self._construct(torch.tensor, args[1:], {"dtype": args[0].dtype, "device": self.recorder.device})
        if isinstance(args[1], Tensor) and args[1].dim() > 0 and not self._is_deferred(args[1]):
            return torch.ops.aten.alias(args[1])
        return func(*args, **kwargs)

    def _to_meta(self, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return a new meta tensor. torch would return the deferred tensor itself, since that is on meta already."""
        _, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        kept = torch.preserve_format if memory_format is None else memory_format
        return torch.empty_like(tensor, dtype=dtype, device="meta", memory_format=kept)

    def _are_compatible(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return whether `.data` of one tensor can be set to another. A deferred tensor takes no other meta tensor."""
        if self._is_deferred(args[0]) and args[1].is_meta:
            return self._is_deferred(args[1])
        return func(*args, **kwargs)

    def _construct(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Build a tensor from Python data that may hold deferred scalars."""
        if func is not torch.tensor and args and self._is_deferred(args[0]):
            # `as_tensor` of a tensor returns the tensor itself if nothing has to change.
            return self._move(Tensor.to, args, kwargs) if kwargs or len(args) > 1 else args[0]
        resolve = self.recorder.value
        args = map_leaves(args, lambda leaf: resolve(leaf) if self._is_deferred(leaf) else leaf)
        if "device" in kwargs and _is_meta_device(kwargs["device"]):
            with self._meta_is_meant():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


# Not in the instance: its bound methods would keep it, and all that it has recorded, until the garbage collector runs.
_HANDLERS: dict[Any, Handler] = {
    Tensor.tolist: Impersonation._on_value,
    Tensor.item: Impersonation._on_value,
    Tensor.__float__: Impersonation._on_value,
    Tensor.__int__: Impersonation._on_value,
    Tensor.__index__: Impersonation._on_value,
    Tensor.__bool__: Impersonation._on_value,
    Tensor.__complex__: Impersonation._on_value,
    Tensor.__repr__: Impersonation._show,
    Tensor.__format__: Impersonation._on_value,
    Tensor.__reduce_ex__: Impersonation._reduce,
    Tensor.numpy: Impersonation._share,
    Tensor.__array__: Impersonation._share,
    Tensor.data_ptr: Impersonation._share,
    Tensor.__dlpack__: Impersonation._share,
    Tensor.untyped_storage: Impersonation._share,
    Tensor.storage: Impersonation._share,
    Tensor._typed_storage: Impersonation._share,
    Tensor.is_shared: Impersonation._on_value,
    Tensor.share_memory_: Impersonation._change,
    Tensor.apply_: Impersonation._change,
    Tensor.map_: Impersonation._change,
    Tensor.map2_: Impersonation._change,
    Tensor.__getitem__: Impersonation._index,
    Tensor.__setitem__: Impersonation._index,
    Tensor.data.__get__: Impersonation._get_data,  # type: ignore[attr-defined]
    Tensor.data.__set__: Impersonation._set_data,  # type: ignore[attr-defined]
    Tensor.new_tensor: Impersonation._new_tensor,
    Tensor.__deepcopy__: Impersonation._deepcopy,
    Tensor.__dlpack_device__: Impersonation._on_value,
    Tensor.to: Impersonation._move,
    Tensor.type: Impersonation._type,
    Tensor.new: Impersonation._new,
    torch.tensor_split: Impersonation._split,
    Tensor.tensor_split: Impersonation._split,
    torch._has_compatible_shallow_copy_type: Impersonation._are_compatible,
    torch.tensor: Impersonation._construct,
    torch.as_tensor: Impersonation._construct,
    torch.asarray: Impersonation._construct,
}


def _is_list_of_numbers(value: Any) -> bool:
    while isinstance(value, (list, range)) and len(value):
        value = value[0]
    return isinstance(value, (int, bool)) and not isinstance(value, Tensor)


def _is_meta_device(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "meta"
    return isinstance(value, str) and value == "meta"


def _is_indexed_cpu(value: Any) -> bool:
    named = isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cpu:"))
    return named and torch.device(value).type == "cpu" and torch.device(value).index is not None


def _same_device(value: Any, own: torch.device) -> bool:
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        return False
    if device.type != own.type:
        return False
    if own.type == "cpu":
        return True  # Every index means the one CPU.
    if device.index is None and own.index is not None and is_present(own):
        device = concrete(device)  # The current device, which the constructor may have changed.
    return device.index in (None, own.index)


def _type_name(dtype: torch.dtype, device: torch.device) -> str:
    """Return the result of `tensor.type()`, such as `torch.cuda.FloatTensor`."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        name = torch.empty(0, dtype=dtype).type()
    return name if device.type == "cpu" else name.replace("torch.", f"torch.{device.type}.", 1)
