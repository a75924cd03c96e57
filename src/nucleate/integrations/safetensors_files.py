"""safetensors inside `init_module`: its tensors are deferred and bound to the file.

Libraries import `safe_open` under their own names. So this file patches the class itself (its methods, in safetensors
0.8) while a model is constructed. This also reaches `load_file` and `load_model`, which open files with it. The library
still opens the file and checks its header; only the reading is deferred.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from nucleate.errors import CheckpointError
from nucleate.integrations.scoped import FileIntegration, Scoped, put

if TYPE_CHECKING:
    from nucleate.checkpoint.stored import StoredTensor

_TORCH = ("pt", "torch", "pytorch")


@final
class SafetensorsFiles(FileIntegration):
    """The integration that binds deferred tensors to safetensors files when a library reads them."""

    name = "safetensors"

    def scoped(self) -> Scoped:
        return _scoped


class _Opened:
    """A file that `safe_open` has opened for torch.

    Args:
        path: The file.
        device: The device that the caller asked for.
    """

    def __init__(self, path: str | os.PathLike[str], device: torch.device) -> None:
        self._path = path
        self._device = device
        self._tensors: dict[str, StoredTensor] | None = None

    @property
    def is_bound(self) -> bool:
        """Whether this thread gets deferred tensors."""
        from nucleate.checkpoint.loading import defers

        return defers(self._device)

    def tensor(self, key: str) -> Tensor | None:
        """Return a deferred tensor, or None if the library must read the tensor itself."""
        from nucleate.checkpoint.loading import bound
        from nucleate.checkpoint.readers.safetensors_file import SafetensorsFile
        from nucleate.checkpoint.stored import DataFile

        if not self.is_bound:
            return None
        if self._tensors is None:
            try:
                self._tensors = SafetensorsFile.read(DataFile(self._path)).tensors
            except CheckpointError:
                # The library may support more of the format than torch does.
                self._tensors = {}
        stored = self._tensors.get(key)
        return None if stored is None else bound(stored, self._device)


class _Slice:
    """A replacement for `PySafeSlice` that returns parts of a deferred tensor.

    Args:
        plain: The library's own object, which knows dtype and shape.
        opened: The file.
        key: The tensor's name.
    """

    def __init__(self, plain: Any, opened: _Opened, key: str) -> None:
        self._plain = plain
        self._opened = opened
        self._key = key

    def get_shape(self) -> Any:
        return self._plain.get_shape()

    def get_dtype(self) -> Any:
        return self._plain.get_dtype()

    def __getitem__(self, index: Any) -> Any:
        tensor = self._opened.tensor(self._key)
        if tensor is None:
            return self._plain[index]
        part = tensor[index]
        # A part from the library has its own memory.
        return part if part.numel() == tensor.numel() else part.clone(memory_format=torch.contiguous_format)


def _install(stack: ExitStack) -> None:
    library = sys.modules["safetensors"]
    cls: Any = library.safe_open
    # Objects of this class take no attributes. Each one goes through `__init__`, so the reuse of an id does no harm.
    opened: dict[int, _Opened] = {}
    stack.callback(opened.clear)

    def init(self: Any, filename: Any, framework: Any = None, device: Any = "cpu", **kwargs: Any) -> None:
        opened.pop(id(self), None)
        if framework in _TORCH and (place := _device(device)) is not None:
            opened[id(self)] = _Opened(filename, place)

    def close(plain: Callable[..., Any], self: Any, *error: Any) -> Any:
        opened.pop(id(self), None)
        return plain(self, *error)

    def get_tensor(plain: Callable[..., Any], self: Any, name: str) -> Any:
        file = opened.get(id(self))
        tensor = file.tensor(name) if file is not None else None
        return plain(self, name) if tensor is None else tensor

    def get_slice(plain: Callable[..., Any], self: Any, name: str) -> Any:
        file = opened.get(id(self))
        found = plain(self, name)
        return found if file is None else _Slice(found, file, name)

    def get_tensors(plain: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        file = opened.get(id(self))
        if file is None or args or kwargs or not file.is_bound:
            return plain(self, *args, **kwargs)
        return {name: self.get_tensor(name) for name in self.offset_keys()}

    put(stack, cls, "__init__", init)
    for name, ours in {
        "__exit__": close, "get_tensor": get_tensor, "get_slice": get_slice, "get_tensors": get_tensors,
    }.items():  # fmt: skip
        if name in vars(cls):
            put(stack, cls, name, _method(vars(cls)[name], ours))
    if (torch_module := sys.modules.get("safetensors.torch")) is not None:
        put(stack, torch_module, "safe_open", _named(cls))


def _method(plain: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(plain, self, *args, **kwargs)

    return method


def _named(cls: Any) -> Callable[..., Any]:
    """Return a function that opens a file as the class does, and adds the file's name to an error."""

    def safe_open(filename: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return cls(filename, *args, **kwargs)
        except Exception as error:
            error.add_note(f"This happened while {filename} was opened.")
            raise

    return safe_open


def _device(device: Any) -> torch.device | None:
    try:
        return torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError):
        return None


_scoped = Scoped(_install)
