"""Outputs of forward: the tensors in them that require gradients, also where FSDP does not look for them.

FSDP looks into dicts, lists, tuples and dataclasses (`collect_grad_tensors` in torch/distributed/fsdp/_common_utils.py,
2.13). A library may return objects of its own, such as torchrec's `KeyedTensor`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

#: The depth to which objects in objects are searched.
_MAX_DEPTH = 10


def tensors_for_fsdp(output: Any) -> tuple[Tensor, ...]:
    """Return the tensors with gradients that FSDP finds in an output."""
    from torch.distributed.fsdp._common_utils import collect_grad_tensors

    return collect_grad_tensors(output)


def hidden_tensors(output: Any) -> list[Tensor]:
    """Return the tensors with gradients in an output in which FSDP finds no such tensor.

    Args:
        output: The output of a forward.
    """
    if isinstance(output, Tensor) or tensors_for_fsdp(output):
        return []
    return list(_search(output, set(), 0))


def _search(value: Any, seen: set[int], depth: int) -> Iterator[Tensor]:
    if id(value) in seen or depth > _MAX_DEPTH:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
        return
    for item in _items(value):
        yield from _search(item, seen, depth + 1)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    # Modules hold parameters, not outputs. Functions, classes and Python modules lead to anything.
    if isinstance(value, (nn.Module, type, ModuleType, FunctionType, MethodType)):
        return []
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in _slots(type(value)))]


def _slots(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots
