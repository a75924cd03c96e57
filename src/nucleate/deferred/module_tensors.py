"""Searches for tensors: the tensors that a module holds, and the tensors in a value."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

# The types of most attributes of a module.
_ATOMS = frozenset((bool, int, float, str, bytes, type(None)))
_EMPTY = frozenset((dict, OrderedDict, list, tuple, set))


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
    """Yield the tensors in a value: a tensor, a collection, an object, or a function with a closure."""
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
    elif isinstance(value, FunctionType):
        items = list(_closed_over(value))
    elif isinstance(value, MethodType):
        items = (value.__self__,)
    elif isinstance(value, partial):
        items = (value.func, value.args, value.keywords)
    elif isinstance(value, (type, ModuleType)):
        return
    else:
        items = list(getattr(value, "__dict__", {}).values())
    seen.add(id(value))
    for item in items:
        yield from every_tensor(item, seen)


def _closed_over(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # The cell is still empty.
            yield cell.cell_contents
