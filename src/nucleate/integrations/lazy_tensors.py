"""Lazy checkpoints of Lightning Fabric and litgpt inside `init_module`: they stay lazy.

A tensor of `_lazy_load` reads itself as soon as torch uses it. Inside the block it then becomes a deferred tensor,
bound to its place in the file. Later operations of torch on this tensor are recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any, final

import torch
from torch import Tensor, nn

from nucleate.deferred import is_recording, record_of
from nucleate.devices.kinds import is_kind
from nucleate.integrations.scoped import FileIntegration, Scoped, put

#: Attributes for which the library reads a tensor (lightning/fabric/utilities/load.py, 2.6), besides device moves.
_TOUCHES = frozenset(("contiguous", "half", "data", "to"))
_MODULES = ("lightning.fabric.utilities.load", "lightning_fabric.utilities.load")


@final
class LazyTensors(FileIntegration):
    """The integration that binds deferred tensors to files that `_lazy_load` has opened."""

    name = "lightning_fabric"

    def scoped(self) -> Scoped:
        return _scoped


def _install(stack: ExitStack) -> None:
    for name in _MODULES:
        cls: Any = getattr(sys.modules.get(name), "_NotYetLoadedTensor", None)
        # nucleate's own stand-in for the library has no lazy tensors: it maps files.
        if not hasattr(cls, "_load_tensor"):
            continue
        plain_get = cls.__getattr__

        # A tensor that was saved as a parameter has its own `_load_tensor`, which a patch of the class does not reach.
        def call(
            cls: Any, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            loaded = [_loaded(arg) if isinstance(arg, cls) else arg for arg in args]
            return func(*loaded, **(kwargs or {}))

        def get(lazy: Any, name: str, plain_get: Any = plain_get) -> Any:
            touches = name in _TOUCHES or is_kind(name)
            return getattr(_loaded(lazy), name) if touches else plain_get(lazy, name)

        put(stack, cls, "_load_tensor", _lazily(cls._load_tensor))
        put(stack, cls, "__torch_function__", classmethod(call))
        put(stack, cls, "__getattr__", get)


def _loaded(lazy: Any) -> Tensor:
    """Return a deferred tensor, or else the tensor that the library reads."""
    made = _deferred(lazy)
    if made is None:
        return lazy._load_tensor()  # type: ignore[no-any-return]
    is_parameter = "_load_tensor" in vars(lazy) and lazy.metatensor.is_leaf
    return nn.Parameter(made, made.requires_grad) if is_parameter else made


def _lazily(plain: Any) -> Any:
    @wraps(plain)
    def load_tensor(lazy: Any) -> Tensor:
        made = _deferred(lazy)
        return plain(lazy) if made is None else made

    return load_tensor


def _deferred(lazy: Any) -> Tensor | None:
    from nucleate.checkpoint.loading import defers

    device = torch.device(lazy.storageinfo[3])
    if not is_recording() or not defers(device):
        return None
    record = record_of(torch.empty(1, device=device))
    made = None if record is None else record.of_lazy(lazy)
    return None if made is None else made.requires_grad_(bool(lazy.rebuild_args[3]))


_scoped = Scoped(_install)
