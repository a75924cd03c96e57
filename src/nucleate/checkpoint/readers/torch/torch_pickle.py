"""The meaning of the names in torch's pickles: tensors become notes of their places, and unknown names stay notes.

The known names are those of `torch.load(weights_only=True)` (torch/_weights_only_unpickler.py, 2.13), and the names
that the user added with `torch.serialization.add_safe_globals`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nucleate.checkpoint.readers.torch.pickled import Global, Maker, Unmade, check_key

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}


@dataclass(frozen=True, slots=True, eq=False)
class StorageRef:
    """A storage that a pickle refers to.

    Attributes:
        key: Its name in the archive.
        dtype: The dtype of its elements.
        size_bytes: Its size.
        begin_bytes: The place in the record where it begins, for the views of older files.
    """

    key: str
    dtype: torch.dtype
    size_bytes: int
    begin_bytes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class PickledTensor:
    """A tensor that a pickle refers to.

    Attributes:
        storage: The storage that holds its elements.
        dtype: The dtype of its elements.
        offset: The place of its first element in the storage, in elements.
        shape: Its shape.
        stride: Its strides, in elements.
        is_conjugate: Whether its numbers are the conjugates of the stored numbers.
        is_negative: Whether its numbers are the negatives of the stored numbers.
    """

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_conjugate: bool = False
    is_negative: bool = False

    def build(self, state: Any) -> None:
        """Ignore the attributes of the tensor, which have no place in a checkpoint."""


class Refused:
    """A tensor of a kind that cannot be read.

    Attributes:
        what: The kind of the tensor, for a message.
    """

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what

    def build(self, state: Any) -> None:
        """Ignore the state."""


class StateDict(OrderedDict[Any, Any]):
    """An ordered dict that `Module.state_dict` may have made.

    Attributes:
        is_of_module: Whether `Module.state_dict` made the dict.
        versions: The version of each module's format, by the module's name, as far as the file contains it.
    """

    is_of_module = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.versions: dict[str, int] = {}

    def build(self, state: Any) -> None:
        """Take the attributes of the dict. Only modules leave an attribute called `_metadata`."""
        self.is_of_module = isinstance(state, dict) and "_metadata" in state
        found = state["_metadata"] if self.is_of_module else None
        for name, one in found.items() if isinstance(found, dict) else ():
            version = one.get("version") if isinstance(one, dict) else None
            if type(name) is str and type(version) is int:
                self.versions[name] = version


class _Allowed:
    """An object whose class the user allowed."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def build(self, state: Any) -> None:
        _check_plain(state)
        if hasattr(self.value, "__setstate__"):
            self.value.__setstate__(unwrapped(state))
        else:
            self.value.__dict__.update(unwrapped(state))


def find(module: str, name: str) -> Any:
    """Return the object for a name in a pickle, or a `Global` if the name stands for code."""
    known = _KNOWN.get((module, name))
    if known is not None:
        return known
    if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
        return dtype
    if name in STORAGES and module.split(".")[0] == "torch":
        return STORAGES[name]
    full_name = f"{module}.{name}"
    for allowed in torch.serialization.get_safe_globals():
        function, allowed_name = (
            allowed if isinstance(allowed, tuple) else (allowed, f"{allowed.__module__}.{allowed.__qualname__}")
        )
        if allowed_name == full_name:
            return Maker(_calling(function))
    return Global(full_name)


def unwrapped(value: Any) -> Any:
    """Return the object itself if `value` is an object whose class the user allowed, or else `value`."""
    return value.value if type(value) is _Allowed else value


def storage_of(persistent_id: Any) -> StorageRef:
    """Return the storage that a persistent id names.

    Raises:
        ValueError: The persistent id does not name a storage.
    """
    if type(persistent_id) is not tuple or persistent_id[0] not in ("storage", b"storage"):
        raise ValueError("it asks for something that is not a storage")
    dtype, key, numel = persistent_id[1], persistent_id[2], persistent_id[4]
    if type(key) is int:
        # litgpt's `incremental_save` writes numbers; torch puts them into the name of the member, as text.
        key = str(key)
    if not isinstance(dtype, torch.dtype) or type(key) is not str or type(numel) is not int or not 0 <= numel < 1 << 60:
        raise ValueError("it asks for a storage without a name, a dtype or a size")
    view = persistent_id[5] if len(persistent_id) > 5 else None
    if view is None:
        return StorageRef(key, dtype, numel * dtype.itemsize)
    _, begin, length = view
    begin, length = _sizes((begin, length))
    if begin + length > numel:
        raise ValueError("a view of a storage reaches beyond the storage")
    return StorageRef(key, dtype, length * dtype.itemsize, begin * dtype.itemsize)


def _sizes(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, (tuple, list)) or len(numbers) > 64:
        raise ValueError("a tensor has no shape or strides")
    if not all(type(number) is int and 0 <= number < 1 << 60 for number in numbers):
        raise ValueError("a tensor has a shape, strides or an offset that are not sizes")
    return tuple(numbers)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> PickledTensor:
    return _tensor_of(storage, storage.dtype, offset, shape, stride, None)


def _tensor_v2(storage: Any, offset: Any, shape: Any, stride: Any, _1: Any, _2: Any, bits: Any = None) -> PickledTensor:
    return _tensor_of(storage, storage.dtype, offset, shape, stride, bits)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _1: Any, _2: Any, dtype: Any, bits: Any = None
) -> PickledTensor:
    return _tensor_of(storage, dtype, offset, shape, stride, bits)


def _tensor_of(storage: Any, dtype: Any, offset: Any, shape: Any, stride: Any, bits: Any) -> PickledTensor:
    if not isinstance(storage, StorageRef) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor has no storage or no dtype")
    shape, stride, (offset,) = _sizes(shape), _sizes(stride), _sizes((offset,))
    if len(shape) != len(stride):
        raise ValueError(f"a tensor has the shape {shape} and the strides {stride}")
    if 0 not in shape:
        last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        if (last + 1) * dtype.itemsize > storage.size_bytes:
            raise ValueError(
                f"a tensor of shape {shape} and strides {stride} reaches to element {last} of storage {storage.key}, "
                f"which has {storage.size_bytes} bytes"
            )
    bits = bits if isinstance(bits, dict) else {}
    return PickledTensor(storage, dtype, offset, shape, stride, bits.get("conj") is True, bits.get("neg") is True)


def _same(tensor: Any, *_: Any) -> Any:
    """Return the tensor of a parameter."""
    if not isinstance(tensor, (PickledTensor, Refused, Unmade)):
        raise ValueError("a parameter has no tensor")
    return tensor


def _typed(function: Any, kind: Any, args: Any, _state: Any) -> Any:
    """Return the tensor of a subclass, or of a tensor with attributes."""
    if type(kind) is Global and kind.name not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
        return Refused(f"a {kind.name}, whose numbers only that class understands")
    if type(function) is not Maker or type(args) is not tuple:
        raise ValueError("a tensor has no function that makes it")
    return function.function(*args)


def _from_cpu(tensor: Any, dtype: Any, *_: Any) -> Any:
    if isinstance(tensor, PickledTensor) and tensor.dtype is not dtype:
        return Refused(f"saved as {tensor.dtype} for a {dtype}")
    return _same(tensor)


def _parameter(tensor: Any = None, *_: Any) -> Any:
    return _same(tensor)


def _refused(what: str) -> Maker:
    return Maker(lambda *_: Refused(what))


def _ordered(items: Any = ()) -> StateDict:
    made = StateDict()
    for key, value in items.items() if isinstance(items, dict) else items:
        check_key(key)
        made[key] = value
    return made


def _counter(items: Any = None) -> Counter[Any]:
    if items is not None and type(items) is not dict:
        raise ValueError("a Counter is not made from a dict")
    made: Counter[Any] = Counter()
    made.update(items or {})
    return made


def _set(items: Any = ()) -> set[Any]:
    if type(items) is not list:
        raise ValueError("a set is not made from a list")
    for item in items:
        check_key(item)
    return set(items)


def _complex(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise ValueError("a complex number is not made from floats")
    return complex(real, imaginary)


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes are not made from text")
    return text.encode("latin-1")


def _bytearray(data: Any = b"", encoding: Any = "latin-1") -> bytearray:
    # Never from a number, because `bytearray(n)` takes n bytes.
    return bytearray(data if type(data) is bytes else _encoded(data, encoding))


def _bytes(data: Any = b"") -> bytes:
    if type(data) is not bytes:
        raise ValueError("bytes are not made from bytes")
    return data


def _size(numbers: Any) -> torch.Size:
    return torch.Size(_sizes(numbers))


def _device(kind: Any, number: Any = None) -> torch.device:
    if type(kind) is not str or len(kind) > 100 or (number is not None and type(number) is not int):
        raise ValueError("a device has no name")
    return torch.device(kind) if number is None else torch.device(kind, number)


def _layout(name: Any) -> torch.layout:
    found = vars(torch).get(str(name).removeprefix("torch."))
    if not isinstance(found, torch.layout):
        raise ValueError("torch does not have the layout of a tensor")
    return found


def _calling(function: Any) -> Callable[..., _Allowed]:
    def call(*args: Any) -> _Allowed:
        _check_plain(args)
        return _Allowed(function(*map(unwrapped, args)))

    return call


def _check_plain(value: Any, depth: int = 0) -> None:
    """Make sure that an object of an allowed class gets plain values, and not the notes of this module."""
    if isinstance(value, (PickledTensor, StorageRef, Refused, Global, Unmade)) or depth > 20:
        raise ValueError("an object of an allowed class holds tensors, or objects of a class that was not allowed")
    if isinstance(value, dict):
        _check_plain([*value, *value.values()], depth + 1)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            _check_plain(item, depth + 1)


_META = "a tensor on the meta device, which has no numbers"
_QUANTIZED = "a quantized tensor of torch; save `tensor.int_repr()`, its scale and its zero point instead"
_SPARSE = "a sparse tensor; save `tensor.to_dense()`, or its indices and values as two tensors"
_NESTED = "a nested tensor; save its values and offsets as two tensors"
_WRAPPER = "a tensor subclass; save the tensors that it consists of"
_NUMPY = "a tensor that was saved as a NumPy array; save `tensor.cpu()`"

_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Maker(_ordered),
    ("collections", "Counter"): Maker(_counter),
    ("__builtin__", "set"): Maker(_set),
    ("builtins", "set"): Maker(_set),
    ("__builtin__", "complex"): Maker(_complex),
    ("builtins", "complex"): Maker(_complex),
    ("__builtin__", "bytearray"): Maker(_bytearray),
    ("builtins", "bytearray"): Maker(_bytearray),
    # Protocol 2 writes b"" this way.
    ("__builtin__", "bytes"): Maker(_bytes),
    ("_codecs", "encode"): Maker(_encoded),
    ("torch", "Size"): Maker(_size),
    ("torch", "device"): Maker(_device),
    ("torch.serialization", "_get_layout"): Maker(_layout),
    ("torch.nn.parameter", "Parameter"): Maker(_parameter),
    ("torch._utils", "_rebuild_tensor"): Maker(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Maker(_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): Maker(_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): Maker(_same),
    ("torch._utils", "_rebuild_parameter_with_state"): Maker(_same),
    ("torch._tensor", "_rebuild_from_type_v2"): Maker(_typed),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): Maker(_from_cpu),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _refused(_NUMPY),
    ("torch._utils", "_rebuild_qtensor"): _refused(_QUANTIZED),
    ("torch._utils", "_rebuild_sparse_tensor"): _refused(_SPARSE),
    ("torch._utils", "_rebuild_nested_tensor"): _refused(_NESTED),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _refused(_META),
    ("torch._utils", "_rebuild_wrapper_subclass"): _refused(_WRAPPER),
}
