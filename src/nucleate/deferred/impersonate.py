"""What Python sees of a deferred tensor: the device it will live on, never meta.

torch and others behave differently on meta tensors: `nn.init.trunc_normal_`, `orthogonal_`, `sparse_` and
`dirac_` return without doing anything (torch/nn/init.py, since 2.12), and transformers skips its whole weight
initialization. So while a constructor runs, `device`, `is_meta` and their like answer for the intended device.
The same mode catches what never reaches aten: host reads of a whole tensor, and `.data =` between a real and a
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
from torch.utils._python_dispatch import _disable_current_modes

from nucleate.deferred.active import turn
from nucleate.deferred.copies import deepcopy
from nucleate.deferred.record import Recorder
from nucleate.deferred.tape import map_leaves

Handler = Callable[..., Any]


class Impersonation(TorchFunctionMode):
    """Makes deferred tensors look like tensors of the recorder's device.

    Args:
        recorder: Says which tensors are deferred and records what is done to them.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        device = recorder.device
        index = device.index if device.index is not None else -1
        self.answers: dict[Any, Any] = {
            Tensor.device.__get__: device,
            Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
            Tensor.is_cpu.__get__: device.type == "cpu",  # type: ignore[attr-defined]
            Tensor.is_cuda.__get__: device.type == "cuda",  # type: ignore[attr-defined]
            Tensor.get_device: index,
        }
        self._handlers: dict[Any, Handler] = {
            Tensor.tolist: self._on_value,
            Tensor.__repr__: self._on_value,
            Tensor.__format__: self._on_value,
            Tensor.__reduce_ex__: self._on_value,
            Tensor.numpy: self._share,
            Tensor.__array__: self._share,
            Tensor.data_ptr: self._share,
            Tensor.__dlpack__: self._share,
            Tensor.data.__get__: self._get_data,  # type: ignore[attr-defined]
            Tensor.data.__set__: self._set_data,  # type: ignore[attr-defined]
            Tensor.new_tensor: self._new_tensor,
            Tensor.__deepcopy__: self._deepcopy,
            Tensor.__dlpack_device__: self._on_value,
            Tensor.to: self._move,
            Tensor.cpu: self._move,
            Tensor.cuda: self._move,
            Tensor.type: self._type,
            torch.tensor: self._construct,
            torch.as_tensor: self._construct,
            torch.asarray: self._construct,
        }

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.recorder.is_on:
            return func(*args, **kwargs)
        if func in self.answers and self._is_deferred(args[0]):
            return self.answers[func]
        handler = self._handlers.get(func)
        if handler is not None:
            with turn:
                return handler(func, args, kwargs)
        if "device" in kwargs and _is_meta_device(kwargs["device"]):
            with self._meta_is_meant():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _is_deferred(self, value: Any) -> bool:
        return isinstance(value, Tensor) and self.recorder.tape.number(value) is not None

    @contextmanager
    def _meta_is_meant(self) -> Iterator[None]:
        before = self.recorder.meta_is_meant
        self.recorder.meta_is_meant = True
        try:
            yield
        finally:
            self.recorder.meta_is_meant = before

    def _on_value(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer from the value the tensor has now."""
        if self._is_deferred(args[0]):
            args = (self.recorder.replayer.value(args[0]), *args[1:])
        return func(*args, **kwargs)

    def _share(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand out memory that the caller may write: from here on the tensor's value is what stands there."""
        tensor = args[0]
        if self._is_deferred(tensor):
            real = self.recorder.replayer.value(tensor)
            self.recorder.link(tensor, real, live=True)
            args = (real, *args[1:])
        return func(*args, **kwargs)

    def _get_data(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Remember the alias: it has a version counter of its own, so an edit through it would not be seen later."""
        alias = func(*args, **kwargs)
        if self._is_deferred(alias) and alias is not args[0]:
            self.recorder.handed_out.append(weakref.ref(alias))
        return alias

    def _deepcopy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Copy a leaf as on its device: torch copies meta tensors by other rules."""
        if type(args[0]) is not Tensor or not args[0].is_leaf or not self._is_deferred(args[0]):
            return func(*args, **kwargs)
        return deepcopy(*args, **kwargs)

    def _new_tensor(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a constant with the options of a tensor; it is real."""
        if not self._is_deferred(args[0]):
            return func(*args, **kwargs)
        options = {"dtype": args[0].dtype, "device": self.recorder.device, **kwargs}
        return self._construct(torch.tensor, args[1:], options)

    def _set_data(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target, value = args
        if self._is_deferred(target) and isinstance(value, Tensor) and not value.is_meta:
            return func(target, self.recorder.adopt(value))
        if not self._is_deferred(target) and self._is_deferred(value):
            return func(target, self.recorder.replayer.value(value))
        return func(target, value)

    def _move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep `to`, `cpu` and `cuda` from copying where eager torch, already there, would return the tensor."""
        if any(_is_meta_device(arg) for arg in (*args[1:], *kwargs.values())):
            with self._meta_is_meant():
                return func(*args, **kwargs)
        if not self._is_deferred(args[0]):
            return func(*args, **kwargs)
        own = self.recorder.device
        if func is Tensor.cpu:
            return args[0] if own.type == "cpu" else func(*args, **kwargs)
        if func is Tensor.cuda:
            target = kwargs.get("device", args[1] if len(args) > 1 else None)
            same = own.type == "cuda" and (target is None or _same_device(target, own))
            return args[0] if same else func(*args, **kwargs)
        there = torch.device("meta")

        def here(leaf: Any) -> Any:
            is_device = isinstance(leaf, (str, torch.device))
            return there if is_device and _same_device(leaf, own) else leaf

        with self._impersonated_target():
            return func(args[0], *map(here, args[1:]), **{name: here(value) for name, value in kwargs.items()})

    @contextmanager
    def _impersonated_target(self) -> Iterator[None]:
        before = self.recorder.meta_is_meant
        self.recorder.meta_is_meant = False
        try:
            yield
        finally:
            self.recorder.meta_is_meant = before

    def _type(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) == 1 and not kwargs and self._is_deferred(args[0]):
            return _type_name(args[0].dtype, self.recorder.device)
        return func(*args, **kwargs)

    def _construct(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Build a tensor from Python data that may hold deferred scalars."""
        if func is not torch.tensor and args and self._is_deferred(args[0]):
            # `as_tensor` of a tensor is the tensor itself where nothing has to change.
            return self._move(Tensor.to, args, kwargs) if kwargs or len(args) > 1 else args[0]
        resolve = self.recorder.replayer.value
        args = map_leaves(args, lambda leaf: resolve(leaf) if self._is_deferred(leaf) else leaf)
        if "device" in kwargs and _is_meta_device(kwargs["device"]):
            with self._meta_is_meant():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _is_meta_device(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "meta"
    return isinstance(value, str) and value == "meta"


def _same_device(value: Any, own: torch.device) -> bool:
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        return False
    return device.type == own.type and device.index in (None, own.index)


def _type_name(dtype: torch.dtype, device: torch.device) -> str:
    """Return what `tensor.type()` says, such as `torch.cuda.FloatTensor`."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        name = torch.empty(0, dtype=dtype).type()
    return name if device.type == "cpu" else name.replace("torch.", f"torch.{device.type}.", 1)
