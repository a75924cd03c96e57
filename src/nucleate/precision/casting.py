"""Casts for precisions: parameters in place, inputs and outputs by copy.

Only the four floating point dtypes that models compute in are cast. Integers, complex numbers, and float8, which has
separate scales, stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from nucleate.deferred import handle_of
from nucleate.precision.fixed_dtype import FixedDtype

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ATOMS = (type(None), bool, int, float, str)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let factories make floating point tensors of `dtype`; restore the earlier default, also after an error."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast floating point parameters to `dtype` in place; they stay the same objects, and still share memory.

    Buffers keep their dtype: rounding a table such as RoPE's `inv_freq` loses bits that no later cast restores. The
    exception is the running statistics of a normalization with weights, whose kernels refuse to mix dtypes
    ("expected scalar type BFloat16 but found Float", torch 2.13 on CPU). Parameters that a `FixedDtype` module names
    keep their dtype too.

    Args:
        model: The module to cast, real or deferred.
        dtype: One of the floating point dtypes.
    """
    sharing: dict[int, list[nn.Parameter]] = defaultdict(list)
    fixed = {
        id(module._parameters[name])
        for module in model.modules()
        if isinstance(module, FixedDtype)
        for name in module.fixed_dtype
        if name in module._parameters
    }
    for parameter in model.parameters():  # Each object once, however often it is tied.
        if parameter.dtype in FLOATING and parameter.dtype != dtype and id(parameter) not in fixed:
            handle = handle_of(parameter)
            cls = type(parameter) if handle is None else handle.cls
            plain = cls is nn.Parameter and not parameter.is_sparse
            sharing[parameter.untyped_storage()._cdata if plain else -id(parameter)].append(parameter)
    for parameters in sharing.values():
        if len(parameters) == 1 or len({parameter.dtype for parameter in parameters}) > 1:
            for parameter in parameters:
                # The flag of the sign is kept: `set_data` of most devices refuses a tensor with other flags.
                _set(parameter, _flipped(_flipped(parameter.data, parameter).to(dtype), parameter))
            continue
        # Views of one storage: cast the storage once, and make the same views again.
        data = _flipped(parameters[0].data, parameters[0])
        whole = data.as_strided((data.untyped_storage().nbytes() // data.element_size(),), (1,), 0).to(dtype)
        for parameter in parameters:
            view = whole.as_strided(parameter.size(), parameter.stride(), parameter.storage_offset())
            _set(parameter, _flipped(view, parameter))
    for module in model.modules():
        if isinstance(module, _NormBase) and module.affine:
            for name in ("running_mean", "running_var"):
                statistic = getattr(module, name)
                if statistic is not None and statistic.dtype != dtype:
                    statistic.data = statistic.data.to(dtype)
    return model


def convert(data: Any, dtype: torch.dtype) -> Any:
    """Cast the floating point tensors in a collection; a collection without tensors to cast is returned itself.

    A module may keep a list or dict, such as a cache, and write into it later. So a collection is only copied if a
    tensor in it must be cast.

    Args:
        data: A tensor, or nested dicts, lists, tuples and dataclasses of tensors. Anything else is kept.
        dtype: The target dtype.
    """
    if isinstance(data, Tensor):
        return data.to(dtype) if data.dtype is not dtype and data.dtype in FLOATING else data
    # Check the most frequent cases first, because the other checks are slow.
    if type(data) in _ATOMS or (type(data) in (dict, list, tuple) and not data):
        return data
    if type(data) not in (dict, list, tuple) and dataclasses.is_dataclass(data) and not isinstance(data, type):
        fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(data) if field.init}
        changes = {name: new for name, old in fields.items() if (new := convert(old, dtype)) is not old}
        return dataclasses.replace(data, **changes) if changes else data
    if isinstance(data, (dict, Mapping)):
        items = {key: convert(value, dtype) for key, value in data.items()}
        if all(items[key] is value for key, value in data.items()):
            return data
        if isinstance(data, defaultdict):
            return type(data)(data.default_factory, items)
        return type(data)(items)  # type: ignore[call-arg]
    if isinstance(data, (list, tuple)):
        values = [convert(value, dtype) for value in data]
        if all(new is old for new, old in zip(values, data, strict=True)):
            return data
        return type(data)(*values) if hasattr(data, "_fields") else type(data)(values)
    return data


def _flipped(view: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return a view with the other sign if a parameter keeps its sign as a flag, as `x.conj().imag` does."""
    return torch._neg_view(view) if parameter.is_neg() else view


def _set(parameter: nn.Parameter, data: Tensor) -> None:
    gradient, parameter.grad = parameter.grad, None
    parameter.data = data
    if gradient is not None:
        parameter.grad = gradient.to(data.dtype)
