"""`torch.load` inside `init_module`: the tensors of a file are deferred and bound to the file.

torch itself unpickles, with `weights_only=True` and onto the meta device, and notes the place of each storage in the
file (torch/serialization.py, 2.13). So torch still refuses unsafe files. torch loads all other files as usual: files of
the format before torch 1.6, files that need `weights_only=False`, tensors inside of objects, other devices.
"""

from __future__ import annotations

import os
import pickle
from contextlib import ExitStack
from functools import wraps
from io import BytesIO
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from nucleate.deferred import is_recording, plain_modes
from nucleate.errors import CheckpointError
from nucleate.integrations.scoped import FileIntegration, Scoped, put

if TYPE_CHECKING:
    from nucleate.checkpoint.stored import DataFile

_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size, torch.device)


@final
class TorchFiles(FileIntegration):
    """The integration that binds deferred tensors to torch's files when `torch.load` reads them."""

    name = "torch"

    def scoped(self) -> Scoped:
        return _scoped


def _install(stack: ExitStack) -> None:
    plain = torch.load

    @wraps(plain)
    def load(f: Any, map_location: Any = None, pickle_module: Any = None, **kwargs: Any) -> Any:
        is_file = isinstance(f, (str, os.PathLike)) and not os.fspath(f).endswith(".safetensors")
        if not is_file or not is_recording():
            return plain(f, map_location, pickle_module, **kwargs)
        if pickle_module is None and not kwargs.keys() - {"weights_only", "mmap"}:
            try:
                return _load(plain, f, map_location)
            except _NotBoundError:
                pass
        try:
            return plain(f, map_location, pickle_module, **kwargs)
        except Exception as error:
            error.add_note(f"This happened while {f} was read.")
            raise

    put(stack, torch, "load", load)
    put(stack, torch.serialization, "load", load)


class _NotBoundError(Exception):
    """A signal that torch must load this file in the usual way."""


def _load(plain: Any, path: str | os.PathLike[str], map_location: Any) -> Any:
    """Return the result of `torch.load`, with deferred tensors."""
    from nucleate.checkpoint.loading import defers
    from nucleate.checkpoint.stored import DataFile

    try:
        file = DataFile(path)
        places, locations = _records(file)
    except (CheckpointError, pickle.UnpicklingError) as error:
        raise _NotBoundError from error
    if map_location is not None:
        if not isinstance(map_location, (str, torch.device)):
            raise _NotBoundError
        locations = {str(map_location)}
    try:
        devices = {torch.device(location) for location in locations}
    except RuntimeError as error:
        raise _NotBoundError from error
    if len(devices) > 1 or any(device.type == "meta" or not defers(device) for device in devices):
        raise _NotBoundError
    try:
        with plain_modes():
            value = plain(path, map_location="meta", weights_only=True, mmap=False)
    except Exception as error:
        raise _NotBoundError from error
    binder = _Binder(file, places, devices.pop() if devices else torch.device("cpu"))
    with plain_modes():
        binder.check(value)
    return binder.replaced(value)


def _records(file: DataFile) -> tuple[dict[int, int], set[str]]:
    """Return the offsets and sizes of the storages in a torch file, and the devices that they were saved from."""
    from nucleate.checkpoint.readers.torch import ZipDirectory, prefix_of

    if not file.size_bytes or file.read(0, min(2, file.size_bytes)) != b"PK":
        raise _NotBoundError
    directory = ZipDirectory(file.read, file.size_bytes, file.name)
    prefix = prefix_of(directory, file.name)

    def content(name: str) -> bytes:
        record = directory.record(f"{prefix}{name}")
        return file.read(record.offset, record.size_bytes)

    is_script = f"{prefix}constants.pkl" in directory
    if is_script or (f"{prefix}byteorder" in directory and content("byteorder") != b"little"):
        raise _NotBoundError
    locations = _Locations(BytesIO(content("data.pkl")))
    try:
        locations.load()
    except Exception as error:
        raise _NotBoundError from error
    data = f"{prefix}data/"
    records = [directory.record(name) for name in directory.names() if name.startswith(data)]
    return {record.offset: record.size_bytes for record in records}, locations.found


class _Anything:
    """A placeholder for every object of a pickle."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


class _Locations(pickle.Unpickler):
    """A reader of the storages' devices in a pickle. It does not import or call anything that the pickle names.

    Attributes:
        found: The devices, in torch's notation.
    """

    def __init__(self, file: BytesIO) -> None:
        super().__init__(file)
        self.found: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        return _Anything

    def persistent_load(self, pid: Any) -> Any:
        self.found.add(str(pid[3]))
        return _Anything()


class _Binder:
    """A replacer of the tensors that torch has made on the meta device.

    Tensors in a state dict, which is a dict of names and tensors, become deferred. Others become real, such as those of
    an optimizer: `setup` does not materialize them, and the user computes with them.

    Args:
        file: The file.
        places: The size in bytes of each storage, by its offset.
        device: The device of the deferred tensors.
    """

    def __init__(self, file: DataFile, places: dict[int, int], device: torch.device) -> None:
        self._file = file
        self._places = places
        self._device = device
        # By offset in the file: the storages to defer, and the new tensors of storages.
        self._weights: set[int] = set()
        self._storages: dict[int, Tensor] = {}
        self._checked: set[int] = set()
        self._done: dict[int, tuple[Any, Any]] = {}

    def check(self, value: Any, is_optimizer: bool = False) -> None:
        """Check that all tensors in a value can be replaced, and find out which of them are weights.

        Args:
            value: A value that torch has loaded onto the meta device.
            is_optimizer: Whether the value belongs to an optimizer's state.

        Raises:
            _NotBoundError: A tensor cannot be replaced.
        """
        if type(value) in _ATOMS or id(value) in self._checked:
            return
        self._checked.add(id(value))
        if isinstance(value, Tensor):
            self._check_tensor(value)
        elif isinstance(value, dict):
            is_optimizer = is_optimizer or {"state", "param_groups"} <= value.keys()
            for key, item in value.items():
                if isinstance(key, (Tensor, tuple)):
                    raise _NotBoundError
                self.check(key)
                self.check(item, is_optimizer)
            self.check(getattr(value, "__dict__", None), is_optimizer)
            if not is_optimizer and _is_state_dict(value):
                storages = (item.untyped_storage() for item in value.values() if isinstance(item, Tensor))
                self._weights.update(offset for each in storages if (offset := each._checkpoint_offset) is not None)
        elif type(value) in (list, tuple, set, frozenset):
            for item in value:
                if type(value) in (set, frozenset) and isinstance(item, (Tensor, tuple)):
                    raise _NotBoundError
                self.check(item, is_optimizer)
        else:
            raise _NotBoundError

    def _check_tensor(self, tensor: Tensor) -> None:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or not tensor.is_meta:
            raise _NotBoundError
        storage = tensor.untyped_storage()
        offset = getattr(storage, "_checkpoint_offset", None)
        is_marked = tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor._backward_hooks
        # The record has at least the bytes of the storage, so it is not compressed.
        fits = offset is not None and self._places.get(offset, -1) >= storage.nbytes()
        if is_marked or tensor.__dict__ or (storage.nbytes() and not fits):
            raise _NotBoundError

    def replaced(self, value: Any) -> Any:
        """Return a value with replaced tensors. Dicts and lists are changed in place."""
        if type(value) in _ATOMS or type(value) in (set, frozenset):
            return value
        if id(value) not in self._done:
            if isinstance(value, tuple):
                self._done[id(value)] = value, tuple(map(self.replaced, value))
            elif isinstance(value, Tensor):
                self._done[id(value)] = value, self._tensor(value)
            else:
                self._done[id(value)] = value, value
                for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
                    value[key] = self.replaced(item)
                if hasattr(value, "__dict__"):
                    self.replaced(value.__dict__)
        return self._done[id(value)][1]

    def _tensor(self, tensor: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            storage, dtype, shape, stride = tensor.untyped_storage(), tensor.dtype, tuple(tensor.shape), tensor.stride()
            begin, requires_grad = int(tensor.storage_offset()), tensor.requires_grad
        with torch.no_grad():
            made = self._on_storage(storage, dtype, shape)
            if made.shape != shape or made.stride() != stride or begin:
                made = made.as_strided(shape, stride, begin)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, requires_grad)
        return made.requires_grad_(requires_grad)

    def _on_storage(self, storage: torch.UntypedStorage, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor on the replacement of a storage; all tensors of the same storage share one replacement."""
        from nucleate.checkpoint.loading import bound
        from nucleate.checkpoint.stored import StoredTensor

        size_bytes, offset = storage.nbytes(), storage._checkpoint_offset
        if not size_bytes or offset is None:
            return torch.empty(shape, dtype=dtype, device=self._device)
        if offset not in self._storages:
            numel = size_bytes // dtype.itemsize
            whole = shape if torch.Size(shape).numel() == numel else (numel,)
            if offset in self._weights:
                stored = StoredTensor.whole(f"storage {offset}", dtype, whole, self._file, offset)
                self._storages[offset] = bound(stored, self._device)
            else:
                with plain_modes():
                    real = torch.empty(whole, dtype=dtype, device="cpu")
                    self._file.read_into(real.data_ptr(), numel * dtype.itemsize, offset)
                    self._storages[offset] = real.to(self._device)
            return self._storages[offset]
        made = self._storages[offset]
        return made.view(made.shape) if made.dtype == dtype else made.reshape(-1).view(dtype)


def _is_state_dict(value: dict[Any, Any]) -> bool:
    """Return whether a dict maps names to tensors; it may also contain numbers and strings."""
    return all(isinstance(key, str) for key in value) and all(
        isinstance(item, Tensor) or type(item) in _ATOMS for item in value.values()
    )


_scoped = Scoped(_install)
