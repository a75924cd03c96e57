"""Copies of sharded models by `copy.deepcopy`, which averages of weights need. FSDP2 itself refuses to copy.

A copy is made as a plain model on the meta device. It is laid out like the original, and then filled from this rank's
shards: no rank gathers anything. A copy of a unit is a model of its own.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from nucleate.dimensions.sharding.gathering import (
    KEY,
    Gathering,
    follow_units,
    gathering_of,
    shards_shown,
    user_attributes,
)
from nucleate.errors import UsageError
from nucleate.layout import is_sharded
from nucleate.materialize.handover import Before
from nucleate.materialize.shards import allocate_shards

#: The dicts of a module that hold hooks, each with the dicts that hold flags of these hooks.
_HOOKS: dict[str, tuple[str, ...]] = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_state_dict_pre_hooks": (),
    "_load_state_dict_pre_hooks": (),
    "_load_state_dict_post_hooks": (),
}
#: The place in a memo of `copy.deepcopy` that is taken while a sharded model is copied.
_COPYING = "nucleate: a sharded model is being copied"


#: Makes known modules of a model units: the model, the modules, and the parameters that no unit takes.
MakeUnits = Callable[[nn.Module, Sequence[nn.Module], set[nn.Parameter]], None]


class ShardedCopy:
    """The `__deepcopy__` of a unit or root.

    Args:
        module: The unit or root.
        make_units: Makes modules of the copy units.
        complete: Prepares the copy for training.
        device: The device that keeps the shards.
    """

    def __init__(
        self,
        module: nn.Module,
        make_units: MakeUnits,
        complete: Callable[[nn.Module], None],
        device: torch.device,
    ) -> None:
        self._module = weakref.ref(module)
        self._make_units = make_units
        self._complete = complete
        self._device = device

    def __call__(self, memo: dict[Any, Any]) -> nn.Module:
        """Return the copy.

        Args:
            memo: The memo of `copy.deepcopy`.

        Raises:
            UsageError: A class copies itself in a way of its own, which does not know of shards.
        """
        module = self._module()
        assert module is not None
        gathering = gathering_of(module)
        assert gathering is not None
        if _COPYING in memo:  # This unit is inside of the module that is being copied.
            return _plain_copy(module, gathering, memo)
        memo[_COPYING] = True
        try:
            with shards_shown(module) or nullcontext():
                return self._copy(module, gathering, memo)
        finally:
            del memo[_COPYING]

    def _copy(self, module: nn.Module, gathering: Gathering, memo: dict[Any, Any]) -> nn.Module:
        sharded: dict[str, Any] = {name: p for name, p in module.named_parameters() if is_sharded(p)}
        inner = _inner_layouts(gathering)
        for parameter in sharded.values():
            memo[id(parameter)] = _on_meta(parameter, inner.get(id(parameter)), memo)
        clone = _plain_copy(module, gathering, memo)
        for part in clone.modules():
            _drop_hooks(vars(part))
        before = Before(clone)
        below = {id(part) for part in module.modules()} - {id(module)}
        units = [memo[id(unit)] for unit in gathering.units.values() if id(unit) in below]
        self._make_units(clone, units, {p for p in clone.parameters() if not p.is_meta})
        allocate_shards(clone, self._device, set())
        copies: dict[str, Any] = dict(clone.named_parameters())
        with torch.no_grad():
            for name, parameter in sharded.items():
                copies[name].to_local().copy_(parameter.to_local())
        before.restore(clone)
        follow_units(clone)
        self._complete(clone)
        of_clone = gathering_of(clone)
        assert of_clone is not None
        for name in gathering.marked if module is gathering.root else ():
            of_clone.mark(name)
        return clone


def _inner_layouts(gathering: Gathering) -> dict[int, Any]:
    """Return torch's specification of each parameter that was a DTensor before it became a shard, by its id."""
    params = [param for group in gathering.groups for param in group.fsdp_params]
    return {id(param.sharded_param): param._unsharded_dtensor_spec for param in params if param.is_dtensor}


def _on_meta(parameter: Any, inner: Any, memo: dict[Any, Any]) -> nn.Parameter:
    """Return a parameter as it was before it became a shard, on the meta device.

    Args:
        parameter: The shard.
        inner: The specification of the DTensor that it was, or None for a plain tensor.
        memo: The memo of `copy.deepcopy`.
    """
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    if inner is not None:
        from torch.distributed.tensor import distribute_tensor

        whole = distribute_tensor(whole, inner.mesh, inner.placements, src_data_rank=None)
    result = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    vars(result).update(copy.deepcopy(user_attributes(parameter), memo))
    return result


def _plain_copy(module: Any, gathering: Gathering, memo: dict[Any, Any]) -> nn.Module:
    """Copy a unit or root as an object of its own class, without anything that FSDP has added."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    cls = type(module).__mro__[type(module)._orig_cls_mro_index]
    state = module.__getstate__()
    if hasattr(cls, "__deepcopy__") or not isinstance(state, dict):
        raise UsageError(
            f"{cls.__name__} copies or pickles itself in a way of its own, which does not know of shards, so a sharded "
            "model with it cannot be copied. Set up a second model, and copy the weights of this model into it by "
            "`second.load_state_dict(model.state_dict())`."
        )
    marked = gathering.marked if module is gathering.root else ()
    added = {STATE_KEY, REGISTRY_KEY, KEY, "__deepcopy__", *marked}
    clone: nn.Module = object.__new__(cls)
    memo[id(module)] = clone
    state = {key: value for key, value in state.items() if key not in added}
    _drop_hooks(state)
    clone.__setstate__(copy.deepcopy(state, memo))
    return clone


def _drop_hooks(namespace: dict[str, Any]) -> None:
    """Leave out the hooks of FSDP and its gathering; the user's hooks stay."""
    for name, flags in _HOOKS.items():
        hooks = namespace[name]
        namespace[name] = type(hooks)((key, hook) for key, hook in hooks.items() if not _is_added(hook))
        for flag in flags:
            namespace[flag] = type(hooks)((k, v) for k, v in namespace[flag].items() if k in namespace[name])


def _is_added(hook: Any) -> bool:
    module = str(getattr(hook, "__module__", ""))
    return module.startswith("torch.distributed.fsdp.") or module == Gathering.__module__
