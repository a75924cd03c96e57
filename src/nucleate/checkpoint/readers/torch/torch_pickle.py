"""The meaning of the names in torch's pickles: tensors become notes of their places, and unknown names stay notes.

The known names are those of `torch.load(weights_only=True)` (torch/_weights_only_unpickler.py, 2.13), and the names
that the user added with `torch.serialization.add_safe_globals`.
"""

from __future__ import annotations

import codecs
import dataclasses
from collections import Counter, OrderedDict
from typing import Any

import torch
from torch._utils import IMPORT_MAPPING, NAME_MAPPING

from nucleate.checkpoint.readers.torch.pickle_keys import KeyBudget
from nucleate.checkpoint.readers.torch.pickle_notes import Allowed, Global, Maker, Unmade
from nucleate.checkpoint.readers.torch.tensor_notes import PickledTensor as PickledTensor
from nucleate.checkpoint.readers.torch.tensor_notes import Refused, StateDict, sizes
from nucleate.checkpoint.readers.torch.tensor_notes import StorageRef as StorageRef
from nucleate.checkpoint.readers.torch.tensor_notes import storage_of as storage_of

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


class Names:
    """The meaning of each name in the pickles of one file."""

    def __init__(self) -> None:
        self._allowed: dict[str, Any] | None = None

    def __call__(self, module: str, name: str) -> Any:
        """Return the object for a name in a pickle, or a `Global` if the name stands for code."""
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if name in STORAGES and module.split(".")[0] == "torch":
            return STORAGES[name]
        # Pickles of protocol 2 have the names of Python 2; torch maps the names of all pickles.
        module, name = NAME_MAPPING.get((module, name)) or (IMPORT_MAPPING.get(module, module), name)
        full_name = f"{module}.{name}"
        if module in _NEVER_ALLOWED:
            return Global(full_name)
        if self._allowed is None:
            self._allowed = allowed_names()
        return Allowed(full_name, self._allowed[full_name]) if full_name in self._allowed else Global(full_name)


def find(module: str, name: str) -> Any:
    """Return the object for one name; see `Names`."""
    return Names()(module, name)


def allowed_names() -> dict[str, Any]:
    """Return the classes and functions that the user allowed, by the names that pickles have for them."""
    return {
        one[1] if isinstance(one, tuple) else f"{one.__module__}.{one.__qualname__}": (
            one[0] if isinstance(one, tuple) else one
        )
        for one in torch.serialization.get_safe_globals()
    }


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> PickledTensor:
    return _tensor_of(_dtype(storage), storage, offset, shape, stride, False, None)


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, _: Any, bits: Any = None
) -> PickledTensor:
    return _tensor_of(_dtype(storage), storage, offset, shape, stride, requires_grad, bits)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, _: Any, dtype: Any, bits: Any = None
) -> PickledTensor:
    return _tensor_of(dtype, storage, offset, shape, stride, requires_grad, bits)


def _dtype(storage: Any) -> Any:
    return storage.dtype if isinstance(storage, StorageRef) else None


def _tensor_of(
    dtype: Any, storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, bits: Any
) -> PickledTensor:
    if not isinstance(storage, StorageRef) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor has no storage or no dtype")
    shape, stride, (offset,) = sizes(shape), sizes(stride), sizes((offset,))
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
    is_conjugate, is_negative = bits.get("conj") is True, bits.get("neg") is True
    return PickledTensor(storage, dtype, offset, shape, stride, is_conjugate, is_negative, requires_grad is True)


def _parameter(tensor: Any = None, requires_grad: Any = True, *_: Any) -> Any:
    """Return the tensor of a parameter."""
    if isinstance(tensor, PickledTensor):
        return dataclasses.replace(tensor, requires_grad=requires_grad is True, is_parameter=True)
    if not isinstance(tensor, (Refused, Unmade)):
        raise ValueError("a parameter has no tensor")
    return tensor


def _typed(function: Any, kind: Any, args: Any, _state: Any) -> Any:
    """Return the tensor of a subclass, or of a tensor with attributes."""
    if isinstance(kind, Global) and kind.name in _SHARDED:
        return Refused(_SHARD)
    if type(kind) is Global and kind.name not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
        return Refused(f"a {kind.name}, whose numbers only that class understands")
    if type(function) is not Maker or type(args) is not tuple:
        raise ValueError("a tensor has no function that makes it")
    return function.function(*args)


def _wrapped(kind: Any = None, *_: Any) -> Any:
    """Return the note of a tensor subclass that consists of other tensors."""
    return Refused(_SHARD if isinstance(kind, Global) and kind.name in _SHARDED else _WRAPPER)


def _from_cpu(tensor: Any, dtype: Any, *_: Any) -> Any:
    if isinstance(tensor, PickledTensor) and tensor.dtype is not dtype:
        return Refused(f"saved as {tensor.dtype} for a {dtype}")
    if not isinstance(tensor, (PickledTensor, Refused, Unmade)):
        raise ValueError("a tensor of a device has no numbers")
    return tensor


def _refused(what: str) -> Maker:
    return Maker(lambda *_: Refused(what))


def _ordered(items: Any = ()) -> StateDict:
    made = StateDict()
    keys = KeyBudget(1000 + 2 * len(items))
    for key, value in items.items() if isinstance(items, dict) else items:
        keys.check(key)
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
    keys = KeyBudget(1000 + 2 * len(items))
    for item in items:
        keys.check(item)
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
    return torch.Size(sizes(numbers))


def _device(kind: Any, number: Any = None) -> torch.device:
    if type(kind) is not str or len(kind) > 100 or (number is not None and type(number) is not int):
        raise ValueError("a device has no name")
    return torch.device(kind) if number is None else torch.device(kind, number)


def _layout(name: Any) -> torch.layout:
    found = vars(torch).get(name.removeprefix("torch.")) if type(name) is str else None
    if not isinstance(found, torch.layout):
        raise ValueError("torch does not have the layout of a tensor")
    return found


_META = "a tensor on the meta device, which has no numbers"
_QUANTIZED = "a quantized tensor of torch; save `tensor.int_repr()`, its scale and its zero point instead"
_SPARSE = "a sparse tensor; save `tensor.to_dense()`, or its indices and values as two tensors"
_NESTED = "a nested tensor; save its values and offsets as two tensors"
_SHARD = (
    "a DTensor: the file holds only the part of one rank. Save a sharded model with `runtime.save` or "
    "`torch.distributed.checkpoint.save`, or save `tensor.full_tensor()`, which all ranks call"
)
# The names of DTensor and of its predecessor since torch 1.12.
_SHARDED = frozenset(
    {
        "torch.distributed.tensor.DTensor",
        "torch.distributed.tensor._api.DTensor",
        "torch.distributed._tensor.DTensor",
        "torch.distributed._tensor.api.DTensor",
        "torch.distributed._shard.sharded_tensor.api.ShardedTensor",
    }
)
# torch/_weights_only_unpickler.py, `_blocklisted_modules`, 2.13.
_NEVER_ALLOWED = frozenset({"sys", "os", "posix", "nt"})
_WRAPPER = "a tensor subclass; save the tensors that it consists of"
_NUMPY = "a tensor that was saved as a NumPy array; save `tensor.cpu()`"

_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Maker(_ordered, OrderedDict),
    ("collections", "Counter"): Maker(_counter, Counter),
    ("__builtin__", "set"): Maker(_set, set),
    ("builtins", "set"): Maker(_set, set),
    ("__builtin__", "complex"): Maker(_complex, complex),
    ("builtins", "complex"): Maker(_complex, complex),
    ("__builtin__", "bytearray"): Maker(_bytearray, bytearray),
    ("builtins", "bytearray"): Maker(_bytearray, bytearray),
    # Protocol 2 writes b"" this way.
    ("__builtin__", "bytes"): Maker(_bytes, bytes),
    ("_codecs", "encode"): Maker(_encoded, codecs.encode),
    ("torch", "Size"): Maker(_size, torch.Size),
    ("torch", "device"): Maker(_device, torch.device),
    ("torch.serialization", "_get_layout"): Maker(_layout),
    ("torch.nn.parameter", "Parameter"): Maker(_parameter, torch.nn.Parameter),
    ("torch._utils", "_rebuild_tensor"): Maker(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Maker(_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): Maker(_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): Maker(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Maker(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Maker(_typed),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): Maker(_from_cpu),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _refused(_NUMPY),
    ("torch._utils", "_rebuild_qtensor"): _refused(_QUANTIZED),
    ("torch._utils", "_rebuild_sparse_tensor"): _refused(_SPARSE),
    ("torch._utils", "_rebuild_nested_tensor"): _refused(_NESTED),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _refused(_META),
    ("torch._utils", "_rebuild_wrapper_subclass"): Maker(_wrapped),
}
