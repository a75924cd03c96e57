"""Assigned parameters: `load_state_dict(assign=True)` gives each name a parameter of its own, also to tied ones.

torch unties them that way; the copies share memory as long as nobody shards or moves them. A deferred model remembers
which of its names were one parameter, so that they are tied again when the model is set up.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

# Of a module, by name: what stood there before. The storage is kept, so that its address stays its own.
_before: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[torch.UntypedStorage, Any]]] = weakref.WeakKeyDictionary()


def note_assigned(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Remember the deferred tensor that a module holds under a name, because another takes its place.

    Args:
        module: The module.
        name: The parameter's name in it.
        tensor: The deferred parameter.
    """
    with torch._C.DisableTorchFunction():
        _before.setdefault(module, {})[name] = (tensor.untyped_storage(), _geometry(tensor))


def retie(model: nn.Module) -> None:
    """Make one parameter again of those that were one, where what was assigned to them shares its memory."""
    if not _before:
        return
    first: dict[Any, nn.Parameter] = {}
    for module in model.modules():
        for name, (storage, geometry) in _before.pop(module, {}).items():
            parameter = module._parameters.get(name)
            if parameter is not None:
                key = (storage._cdata, geometry, _memory(parameter))
                module._parameters[name] = first.setdefault(key, parameter)


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    with torch._C.DisableTorchFunction():
        place = tensor.untyped_storage()._cdata if tensor.is_meta else tensor.data_ptr()
        return (place, _geometry(tensor))


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.dtype, tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset()))
