"""What a recorder needs to know of an aten operation: read from its schema once; where that says too little, listed."""

from __future__ import annotations

import functools
from typing import Any

import torch

aten = torch.ops.aten

# In-place operations that do not look at what was there (`self` is only written).
_FILLS = {
    aten.zero_, aten.fill_, aten.copy_, aten.normal_, aten.uniform_, aten.random_, aten.bernoulli_,
    aten.exponential_, aten.log_normal_, aten.cauchy_, aten.geometric_,
}  # fmt: skip
_EMPTY = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.empty_permuted}
# These change what a tensor points to, not a value: the geometry of the tensor that survives says it all.
_RETARGET = {aten.set_, aten.resize_}
# They update running statistics, which their schemas do not say (aten/src/ATen/native/native_functions.yaml).
_WRITES_STATISTICS = {aten.native_batch_norm, aten.cudnn_batch_norm, aten.miopen_batch_norm}
# Their meta kernels are wrong about strides (torch 2.13), so they are run for their geometry.
_WRONG_ON_META = {aten._linalg_svd}


class Traits:
    """What a recorder needs to know of an operation, read from its schema once."""

    __slots__ = ("device", "fills", "is_random", "mutated", "retargets", "uninitialized", "wrong_on_meta")

    def __init__(self, func: torch._ops.OpOverload[Any, Any]) -> None:
        packet = func.overloadpacket
        arguments = func._schema.arguments
        #: (position, name, is `out=`) of each argument that is written.
        self.mutated = [
            (index, argument.name, argument.is_out)
            for index, argument in enumerate(arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if packet in _WRITES_STATISTICS:
            self.mutated += [(3, "running_mean", False), (4, "running_var", False)]
        self.is_random = torch.Tag.nondeterministic_seeded in func.tags
        self.fills = packet in _FILLS
        self.uninitialized = packet in _EMPTY
        self.retargets = packet in _RETARGET
        self.wrong_on_meta = packet in _WRONG_ON_META
        self.device = any(argument.name == "device" for argument in arguments)


traits_of = functools.cache(Traits)
