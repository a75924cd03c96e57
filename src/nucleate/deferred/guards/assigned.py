"""Assigned parameters: `load_state_dict(assign=True)` gives each name its own parameter, even if names are tied.

This unties the names. Their parameters share memory until somebody shards or moves them. A deferred model remembers
which of its names stood for one parameter, so that they are tied again when the model is set up.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

# For each module, by name: storage and geometry of the replaced parameter. The storage is kept, so that no other
# storage gets its address.
_before: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[torch.UntypedStorage, Any]]] = weakref.WeakKeyDictionary()


def note_assigned(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Remember the deferred tensor that a module holds under a name, because another tensor replaces it.

    Args:
        module: The module.
        name: The parameter's name in it.
        tensor: The deferred parameter.
    """
    with torch._C.DisableTorchFunction():
        _before.setdefault(module, {})[name] = (tensor.untyped_storage(), _geometry(tensor))


def retie(model: nn.Module) -> None:
    """Tie names again that stood for one parameter, if the parameters that they got share memory."""
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
