"""Searches for tensors: the tensors that a module holds, and the tensors in a value."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ProxyTypes

from torch import Tensor, nn

# The types of most attributes of a module.
_ATOMS = frozenset((bool, int, float, str, bytes, type(None)))
_EMPTY = frozenset((dict, OrderedDict, list, tuple, set))
# Objects that hold no tensor of the module. Modules are searched by themselves.
_LEAVES = (str, bytes, int, float, nn.Module, type, ModuleType)
_COLLECTIONS: tuple[type[Any], ...] = (list, tuple, set, frozenset, deque)


def held_tensors(module: nn.Module, barren: set[int] | None = None) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the tensors that a module itself holds, as (kind, name, tensor).

    The kind is `"parameter"`, `"buffer"` or `"attribute"`. A tensor inside of a collection, dataclass or namespace has
    the name of the module's attribute.

    Args:
        module: The module.
        barren: The ids of objects that lead to no tensor, such as a configuration that every module holds. The calls
            for the modules of one model share it, so that such an object is searched once.
    """
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield "parameter", name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield "buffer", name, buffer
    for name, value in module.__dict__.items():
        if name not in ("_parameters", "_buffers", "_modules"):
            if type(value) in _ATOMS or (type(value) in _EMPTY and not value):
                continue
            if barren is not None and id(value) in barren:
                continue
            found, seen = False, set[int]()
            for tensor in every_tensor(value, seen):
                found = True
                yield "attribute", name, tensor
            if barren is not None and not found:
                # No object that the value leads to holds a tensor.
                barren |= seen


def every_tensor(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield the tensors in a value: a tensor, a collection, an object, or a function with a closure.

    Modules are left out. The search does not recurse, because an object that a module holds, such as Lightning's
    `Trainer`, leads to chains of any length.

    Args:
        value: The value.
        seen: Gets the ids of the objects that were searched. These are not searched again.
    """
    seen = set() if seen is None else seen
    pending: list[Iterator[Any]] = [iter((value,))]
    while pending:
        for item in pending[-1]:
            if issubclass(type(item), Tensor):
                yield item
            elif type(item) not in _ATOMS:
                inside = _inside(item, seen)
                if inside is not None:
                    pending.append(inside)
                    break
        else:
            pending.pop()


def _inside(value: Any, seen: set[int]) -> Iterator[Any] | None:
    """Return the objects that a value holds directly, or None if the value cannot hold any or was searched before."""
    cls = type(value)  # Not `isinstance`, which asks an object that stands for another one.
    if id(value) in seen or issubclass(cls, _LEAVES):
        return None
    seen.add(id(value))
    for kind in _COLLECTIONS:
        if issubclass(cls, kind):
            return iter(list(kind.__iter__(value)))
    if issubclass(cls, dict):
        return iter(list(dict.values(value)))
    if cls is FunctionType:
        return _closed_over(value)
    if cls is MethodType:
        return iter((value.__self__,))
    if issubclass(cls, partial):
        return iter((value.func, value.args, value.keywords))
    try:
        if cls in ProxyTypes and issubclass(value.__class__, (Tensor, *_LEAVES)):
            return None
        return iter(list(value.values() if isinstance(value, Mapping) else value.__dict__.values()))
    except (AttributeError, ReferenceError):  # It has no attributes, or is the weak proxy of an object that is gone.
        return None


def _closed_over(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # The cell is still empty.
            yield cell.cell_contents
