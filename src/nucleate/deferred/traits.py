"""What a recorder needs to know of an aten operation: read from its schema once; where that says too little, listed."""

from __future__ import annotations

import functools
from typing import Any

import torch

from nucleate.deferred.bounds import CHECKED

aten = torch.ops.aten

# In-place operations that do not look at what was there (`self` is only written).
_FILLS = {
    aten.zero_, aten.fill_, aten.copy_, aten.normal_, aten.uniform_, aten.random_, aten.bernoulli_,
    aten.exponential_, aten.log_normal_, aten.cauchy_, aten.geometric_,
}  # fmt: skip
# They open files, which may be gone later.
_REAL = {aten.from_file}
_EMPTY = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.empty_permuted}
# These change what a tensor points to, not a value: the geometry of the tensor that survives says it all.
_RETARGET = {aten.set_, aten.resize_}
# They update running statistics, which their schemas do not say (aten/src/ATen/native/native_functions.yaml).
_WRITES_STATISTICS = {aten.native_batch_norm, aten.cudnn_batch_norm, aten.miopen_batch_norm}
# Their meta kernels are wrong about strides, shapes or dtypes (torch 2.13), so they are run for their geometry.
_WRONG_ON_META = {
    "_linalg_svd", "linalg_eig", "_linalg_eig", "_fft_r2c", "_fft_c2c", "_fft_c2r", "max_unpool2d", "max_unpool3d",
    "nonzero_static", "quantize_per_tensor", "quantize_per_channel", "quantize_per_tensor_dynamic",
    "native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update", "_batch_norm_no_update",
    "_embedding_bag_forward_only", "_embedding_bag", "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
    "sort",
}  # fmt: skip
# They refuse parameters by value, and moving the generator takes a run anyway.
_REFUSING = {"multinomial", "bernoulli", "poisson", "binomial", "_standard_gamma", "_sample_dirichlet"}
# Their answers follow from shapes and dtypes.
_GEOMETRIC = {
    aten.is_same_size,
    aten.sym_size,
    aten.sym_stride,
    aten.sym_numel,
    aten.sym_storage_offset,
    aten.is_complex,
}


class Traits:
    """What a recorder needs to know of an operation, read from its schema once."""

    __slots__ = (
        "device", "fills", "indexes", "is_random", "looks_at_values", "mutated", "retargets", "uninitialized",
        "wrong_on_meta",
    )  # fmt: skip

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
        # What is no tensor is an answer for Python, and so is a check that returns nothing: both look at values.
        returns = [argument.type for argument in func._schema.returns]
        answers = not self.mutated and not any("Tensor" in str(kind) for kind in returns) and packet not in _GEOMETRIC
        name = packet.__name__
        self.looks_at_values = answers or name in _REFUSING
        self.wrong_on_meta = name in _WRONG_ON_META
        self.indexes = packet in CHECKED
        self.device = any(argument.name == "device" for argument in arguments) and packet not in _REAL


traits_of = functools.cache(Traits)
