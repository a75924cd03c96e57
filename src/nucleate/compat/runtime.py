"""`Fabric`: a runtime with Fabric's defaults, for scripts that nobody has edited.

nucleate differs from Fabric in a few places on purpose, such as the default precision. An unedited script counts on
Fabric's way there. Everything else is `Runtime`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch.distributed
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn
from torch.optim import Optimizer

from nucleate.cluster.environment import Environment
from nucleate.compat.pieces.lightning_module import LightningModule
from nucleate.compat.pieces.reset_methods import call_assigned_reset_methods
from nucleate.precision.base import Precision
from nucleate.runtime import Runtime


class Fabric(Runtime):
    """A `Runtime` that behaves as Fabric where the two differ and a script may count on it.

    - Without `precision`, parameters and inputs are cast to float32.
    - `init_module(empty_init=True)` under a strategy that does not shard ends with real tensors, because scripts
      fill or edit them before `setup`. They have the values of the constructor.
    - A `reset_parameters` that a script gives to a module object makes this module's values under strategies that
      shard, at `setup`.
    - `load` returns everything in the checkpoint that the state does not contain.
    - `all_gather` in one process returns the tensors as they are.
    - In a rank of a running group, `devices=1` makes a runtime of this process alone. A script does so on rank 0 to
      convert a checkpoint.

    Args:
        precision: See `Runtime`. None stands for `"32-true"`.
        plugins: See `Runtime`.
        arguments: The other arguments of `Runtime`.
    """

    def __init__(self, *, precision: Any = None, plugins: Any = None, **arguments: Any) -> None:
        given = [plugin for plugin in _listed(plugins) if plugin is not None]
        if precision is None and not any(isinstance(plugin, Precision) for plugin in given):
            precision = "32-true"
        self._is_alone = arguments.get("devices") in (1, "1") and _runs_in_group()
        if self._is_alone:
            given.append(Environment())
        super().__init__(precision=precision, plugins=given, **arguments)
        self._show_to_scripts()

    def _renew(self) -> None:
        super()._renew()
        self._show_to_scripts()

    def _show_to_scripts(self) -> None:
        """Put parts of this runtime where scripts look for them."""
        self.strategy.precision = self.precision  # type: ignore[attr-defined]
        if not self._is_alone:
            rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Iterator[None]:
        """Construct a model inside this context; see `Runtime.init_module` and this class."""
        with super().init_module(empty_init if self.strategy.shards or not empty_init else None):
            yield

    def setup(self, module: nn.Module, *optimizers: Optimizer, **arguments: Any) -> Any:
        """Set up a model and optimizers; see `Runtime.setup` and this class."""
        if self.strategy.shards:
            with super().init_module(empty_init=True):
                call_assigned_reset_methods(module)
        for part in module.modules():
            if isinstance(part, LightningModule):
                part.fabric = self
        return super().setup(module, *optimizers, **arguments)

    def load(self, path: str | PathLike[str], state: Any = None, strict: bool = True, **arguments: Any) -> Any:
        """Read a checkpoint into `state`, and return the remainder."""
        return super().load(path, state, strict, **{"remainder": True, **arguments})

    def all_gather(self, data: Any, *arguments: Any, **keywords: Any) -> Any:
        """Return every rank's tensors stacked along a new leading axis; in one process without this axis."""
        gathered = super().all_gather(data, *arguments, **keywords)
        return gathered if self.world_size > 1 else apply_to_collection(gathered, torch.Tensor, operator.itemgetter(0))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _runs_in_group() -> bool:
    """Return whether this process is one of several ranks that have started."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1
