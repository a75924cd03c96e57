"""The class that FSDP2 gives a sharded module: where torch's own cannot be assigned, one of the same behaviour is made.

`fully_shard` derives a class from `FSDPModule` and the module's class, in this order, and assigns it to the module
(`_apply_to_module` in torch/distributed/fsdp/_fully_shard/_fsdp_init.py, 2.13). CPython refuses the assignment if the
two classes get their instance dictionary at different depths. This is so if the first base of the module's class has
`__slots__ = ()`, as `abc.ABC`, `typing.Generic` and `typing.Protocol` have.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def make_shardable(module: nn.Module) -> None:
    """Register a class that `fully_shard` can assign to this module, if torch's own could not be assigned.

    The class inherits the module's memory layout, and looks names up in torch's order: `FSDPModule` comes first.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fully_shard import _unimplemented_deepcopy, get_cls_to_fsdp_cls

    cls, known = type(module), get_cls_to_fsdp_cls()
    # An attempt of `fully_shard` that failed leaves the class that could not be assigned.
    if _begins_at_object(cls) or (cls in known and known[cls].__base__ is cls):
        return

    class FSDPFirst(type(cls)):  # type: ignore[misc]
        """Puts `FSDPModule` first among the bases, although the module's class gives the layout."""

        def mro(self) -> list[type]:
            return [self, FSDPModule, *cls.__mro__]

    namespace: dict[str, Any] = {"__deepcopy__": _unimplemented_deepcopy, "__module__": cls.__module__}
    known[cls] = FSDPFirst(f"FSDP{cls.__name__}", (cls, FSDPModule), namespace)


def _begins_at_object(cls: type) -> bool:
    """Say whether the base that gives instances their dictionary derives from `object` alone, as `FSDPModule` does."""
    base = cls.__base__
    while base is not None and base.__dictoffset__ and base.__weakrefoffset__:
        cls, base = base, base.__base__
    return base is object
