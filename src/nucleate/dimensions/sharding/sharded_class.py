"""The class of modules that FSDP2 shards: if torch's class cannot be assigned, this file makes an equivalent one.

`fully_shard` derives a class from `FSDPModule` and the module's class, in this order, and assigns it to the module
(`_apply_to_module` in torch/distributed/fsdp/_fully_shard/_fsdp_init.py, 2.13). CPython refuses the assignment if the
two classes get their instance dictionary at different depths. This happens if the first base of the module's class has
`__slots__ = ()`, as `abc.ABC`, `typing.Generic` and `typing.Protocol` do.

`fully_shard` also refuses a `ModuleList` or `ModuleDict` without a forward (`_validate_module`, same file), because it
would never gather their parameters. As the root of a model they own no parameters that FSDP gathers, so this file gives
them a class with a forward that raises torch's own error.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from nucleate.dimensions.parts import absent_forward


def make_shardable(module: nn.Module, replicates: bool = False) -> None:
    """Register a class that torch can assign to this module, if torch's own class could not be assigned.

    The class inherits the module's memory layout, and looks up names in torch's order: torch's class comes first.

    Args:
        module: The module.
        replicates: Whether `replicate` makes it a unit, not `fully_shard`.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fully_shard import _unimplemented_deepcopy, get_cls_to_fsdp_cls

    first, known = [FSDPModule], get_cls_to_fsdp_cls()
    if replicates:
        from torch.distributed._composable.replicate_with_fsdp import ReplicateModule, cls_to_replicate_cls

        first, known = [ReplicateModule, FSDPModule], cls_to_replicate_cls
    cls = type(module)
    # After a failed `fully_shard`, torch's cache still has the class that could not be assigned.
    if _begins_at_object(cls) or (cls in known and known[cls].__base__ is cls):
        return

    class TorchFirst(type(cls)):  # type: ignore[misc]
        """A metaclass that puts torch's class first among the bases, although the module's class gives the layout."""

        def mro(self) -> list[type]:
            return [self, *first, *cls.__mro__]

    namespace: dict[str, Any] = {"__deepcopy__": _unimplemented_deepcopy, "__module__": cls.__module__}
    prefix = "Replicate" if replicates else "FSDP"
    known[cls] = TorchFirst(f"{prefix}{cls.__name__}", (cls, first[0]), namespace)


def make_root(model: nn.Module) -> None:
    """Give a container without a forward a class that `fully_shard` accepts as a root."""
    cls: Any = type(model)
    if isinstance(model, (nn.ModuleList, nn.ModuleDict)) and cls.forward is nn.Module.forward:
        model.__class__ = _with_absent_forward(cls)


@functools.cache
def _with_absent_forward(cls: Any) -> Any:
    namespace = {"forward": absent_forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls)(cls.__name__, (cls,), namespace)


def _begins_at_object(cls: type) -> bool:
    """Return whether the base that gives instances their dictionary derives only from `object`, like `FSDPModule`."""
    base = cls.__base__
    while base is not None and base.__dictoffset__ and base.__weakrefoffset__:
        cls, base = base, base.__base__
    return base is object
