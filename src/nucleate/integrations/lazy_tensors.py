"""Lazy checkpoints of Lightning Fabric and litgpt inside `init_module`: they stay lazy.

A tensor of `_lazy_load` reads itself as soon as torch touches it. Inside the block it becomes a deferred tensor then,
bound to its record in the file. What torch does next with it is recorded.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import wraps
from typing import Any, final

import torch
from torch import Tensor, nn

from nucleate.deferred import give, given_of_lazy, is_recording
from nucleate.integrations.scoped import FileIntegration, Scoped, put

_MODULES = ("lightning.fabric.utilities.load", "lightning_fabric.utilities.load")


@final
class LazyTensors(FileIntegration):
    """Binds deferred tensors to files that `_lazy_load` has opened."""

    def scoped(self) -> Scoped:
        return _scoped


def _install(stack: ExitStack) -> None:
    for name in _MODULES:
        cls: Any = getattr(sys.modules.get(name), "_NotYetLoadedTensor", None)
        if cls is not None:
            put(stack, cls, "_load_tensor", _lazily(cls._load_tensor))


def _lazily(plain: Any) -> Any:
    @wraps(plain)
    def load_tensor(lazy: Any) -> Tensor:
        from nucleate.checkpoint.binding import defers

        given = given_of_lazy(lazy) if is_recording() else None
        if given is None or not defers(torch.device(lazy.storageinfo[3])):
            loaded: Tensor = plain(lazy)
            return loaded
        made = torch.empty(given.shape, dtype=given.dtype, device=lazy.storageinfo[3])
        if made.numel():
            give(made, given)
        return made.requires_grad_(bool(lazy.rebuild_args[3]))

    return load_tensor


_scoped = Scoped(_install)
