"""Meta shapes: the result of an operation, found without computing it.

torch's meta kernels give the general answer. Many of them are written in Python, and the first one imports torch's
symbolic shapes, or its compiler. This takes a second and 70 MiB, more than recording a whole model. So the most
frequent operations of constructors get cheaper answers. Fills and other in-place operations on one tensor return that
tensor. Small operations run on tensors of ones, large ones on miniatures (`miniatures.py`). If the arguments state the
shape, it is read from them (`sized.py`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred.recording.miniatures import result_on_miniatures
from nucleate.deferred.recording.op_schema import schema_of, written_by
from nucleate.deferred.recording.sized import result_of_sizes
from nucleate.deferred.tape.leaves import map_leaves, tensors

aten = torch.ops.aten

#: Elementwise operations on tensors up to this many elements run on ones.
SMALL_NUMEL = 1 << 14

# The most elements that stand-ins may have, while one operation runs.
_STAND_IN_NUMEL = 1 << 22

# The shapes of their results follow from the shapes and numbers of their arguments, never from values.
_BY_SHAPE = {aten.cat, aten.stack, aten.triu, aten.tril, aten.diagonal_copy}
# Operations of layers in a dry run, by which a constructor learns the width of the next layer. Up to some size they run
# on ones, which is not slower than eager construction.
_OF_LAYERS = {
    aten.convolution, aten.native_layer_norm, aten.native_group_norm, aten.avg_pool2d, aten.avg_pool3d,
    aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d, aten.adaptive_max_pool2d, aten.adaptive_max_pool3d,
    aten.max_pool2d_with_indices, aten.max_pool3d_with_indices, aten.upsample_linear1d, aten.upsample_bilinear2d,
    aten.upsample_bicubic2d, aten.upsample_trilinear3d, aten.upsample_nearest1d, aten.upsample_nearest2d,
    aten.upsample_nearest3d, aten.reflection_pad1d, aten.reflection_pad2d, aten.replication_pad1d,
    aten.replication_pad2d, aten.glu, aten.log_sigmoid_forward, aten.pixel_shuffle, aten.pixel_unshuffle, aten.im2col,
    aten.col2im, aten.grid_sampler_2d, aten.grid_sampler_3d, aten.nll_loss_forward, aten.mse_loss, aten.linalg_cross,
}  # fmt: skip
_OF_LAYERS_NUMEL = 1 << 17
# Dtypes for which all operations of constructors have kernels.
_USUAL = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
_FOR_ALL_DTYPES = {
    *_BY_SHAPE, aten.copy_, aten.clone, aten._to_copy, aten._unsafe_view, aten.zero_, aten.fill_, aten.index,
    aten.arange,
}  # fmt: skip
_trusted: set[tuple[Any, tuple[torch.dtype, ...]]] = set()


def result_on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], fills: bool) -> Any:
    """Return an operation's result as meta tensors. Arguments that it returns are returned unchanged.

    Args:
        func: The aten overload.
        args: Its positional arguments; tensors on any device.
        kwargs: Its keyword arguments.
        fills: Whether it writes its first argument without reading it.

    Raises:
        Exception: The operation's error for such arguments, or for meta tensors (no kernel, or values needed).
    """
    given = tensors((args, kwargs))
    elementwise = torch.Tag.pointwise in func.tags
    if func._schema.is_mutable and (
        any(map(_overlaps, written_by(schema_of(func), args, kwargs))) or _overlap_in_part(given)
    ):
        raise NotImplementedError("meta kernels do not refuse writes to memory that elements share")
    if len(given) == 1 and args and given[0] is args[0] and _returns_self(func) and (fills or elementwise):
        # The operation refuses wrong numbers and dtypes if it runs on one element.
        if torch.Tag.nondeterministic_seeded in func.tags:
            kwargs = {**kwargs, "generator": torch.Generator()}
        func(torch.ones(1, dtype=given[0].dtype), *args[1:], **kwargs)
        return args[0]
    if func is aten.geqrf.default:
        return _geqrf(given[0])
    numel = sum(tensor.numel() for tensor in given)
    packet = func.overloadpacket
    if given and not func._schema.is_mutable:
        if numel <= SMALL_NUMEL and (packet in _BY_SHAPE or (elementwise and _stays_small(given))):
            return map_leaves(func(*map_leaves(args, _ones), **map_leaves(kwargs, _ones)), to_meta)
        if packet in _OF_LAYERS and (numel <= _OF_LAYERS_NUMEL or not all(map(Tensor.is_contiguous, given))):
            # Some of their meta kernels mistake other memory formats for the default one (torch 2.13).
            return result_on_stand_ins(func, args, kwargs)
    for known in (result_of_sizes, result_on_miniatures) if all(map(is_plain, given)) else ():
        result = known(func, args, kwargs, given)
        if result is not None:
            return result
    return func(*map_leaves(args, to_meta), **map_leaves(kwargs, to_meta))


def result_on_stand_ins(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an operation's result as meta tensors, found by running it on real tensors of the same geometry.

    This is for operations with missing or wrong meta kernels, if the geometry of the result does not depend on values.

    Args:
        func: The aten overload, not a random one.
        args: Its positional arguments; tensors on any device.
        kwargs: Its keyword arguments.

    Raises:
        Exception: The operation's error for ones and zeros, or the stand-ins would overlap or take much memory.
    """
    given = tensors((args, kwargs))
    if (
        sum(tensor.numel() for tensor in given) > _STAND_IN_NUMEL
        or _overlap_in_part(given)
        or any(map(_overlaps, given))
    ):
        raise NotImplementedError
    originals: dict[int, tuple[Tensor, Any]] = {}

    def stand_in(leaf: Any) -> Any:
        real = _ones(leaf)
        if isinstance(leaf, Tensor):
            if not leaf.is_floating_point() and not leaf.is_complex():
                real.zero_()  # a valid index
            originals[id(real)] = real, leaf
        return real

    result = func(*map_leaves(args, stand_in), **map_leaves(kwargs, stand_in))
    if any(real.size() != leaf.size() for real, leaf in originals.values()):
        raise NotImplementedError("the operation resizes its `out=`")
    return map_leaves(result, lambda leaf: originals[id(leaf)][1] if id(leaf) in originals else to_meta(leaf))


# Products that need one dtype. Most of their meta kernels do not check it.
_PRODUCTS = {
    torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.mv, torch.ops.aten.dot, torch.ops.aten.vdot,
    torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.addmv, torch.ops.aten.addmv_, torch.ops.aten.baddbmm,
    torch.ops.aten.addbmm,
}  # fmt: skip


def is_doubtful(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a small operation may lack a kernel for its dtypes. Its meta kernel would not say so."""
    given = tensors((args, kwargs))
    # An operation that changes a shape in place must run on the meta tensor itself.
    if not given or not isinstance(func, torch._ops.OpOverload) or torch.Tag.inplace_view in func.tags:
        return False
    known = torch.Tag.pointwise in func.tags or func.overloadpacket in _FOR_ALL_DTYPES
    # Many operations, such as `index_put_`, take one dtype only. So a call with several dtypes is tried once.
    floats = {tensor.dtype for tensor in given if tensor.is_floating_point()}
    usual = known or (len(floats) == 1 and floats <= _USUAL)
    if func.overloadpacket in _PRODUCTS and len({tensor.dtype for tensor in given}) > 1:
        usual = False
    return not usual and sum(t.numel() for t in given) <= 4 * SMALL_NUMEL and (func, _dtypes(given)) not in _trusted


def trust(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Remember that an operation has a kernel for these dtypes."""
    given = tensors((args, kwargs))
    # On zero elements, kernels take any dtype.
    if isinstance(func, torch._ops.OpOverload) and all(tensor.numel() for tensor in given):
        _trusted.add((func, _dtypes(given)))


def _dtypes(given: list[Tensor]) -> tuple[torch.dtype, ...]:
    return tuple(tensor.dtype for tensor in given)


def _geqrf(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result of `geqrf`, which has no meta kernel (torch 2.13). LAPACK stores its factors by columns."""
    *batch, num_rows, num_cols = matrix.shape
    factors = torch.empty((*batch, num_cols, num_rows), dtype=matrix.dtype, device="meta").mT
    return factors, torch.empty((*batch, min(num_rows, num_cols)), dtype=matrix.dtype, device="meta")


def to_meta(leaf: Any) -> Any:
    """Return a meta tensor of the same geometry for a tensor, and the meta device for a device."""
    if isinstance(leaf, Tensor) and not leaf.is_meta and is_plain(leaf):
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
    if isinstance(leaf, torch.device):
        return torch.device("meta")
    return leaf


def is_plain(tensor: Tensor) -> bool:
    """Return whether storage, dtype, shape and strides describe a tensor fully, unlike a sparse or quantized one."""
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized


def _stays_small(given: list[Tensor]) -> bool:
    """Return whether tensors stay small when they are broadcast."""
    if len(given) == 1:
        return True
    longest = max(tensor.dim() for tensor in given)
    padded = [(1,) * (longest - tensor.dim()) + tuple(tensor.size()) for tensor in given]
    numel: int = math.prod(max(lengths) for lengths in zip(*padded, strict=True))
    return numel <= _STAND_IN_NUMEL


def _ones(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype).fill_(1)
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def _overlaps(tensor: Tensor) -> bool:
    """Return whether elements share memory, as after `expand`. Most operations refuse to write such a tensor."""
    return any(stride == 0 and length > 1 for stride, length in zip(tensor.stride(), tensor.size(), strict=True))


def _overlap_in_part(given: list[Tensor]) -> bool:
    """Return whether two different tensors lie on one storage, so that writing one may change the other."""
    if len(given) < 2:
        return False
    places: dict[int, tuple[Any, ...]] = {}
    for tensor in given:
        place = tensor.storage_offset(), tensor.size(), tensor.stride()
        if places.setdefault(tensor.untyped_storage()._cdata, place) != place:
            return True
    return False


def _returns_self(func: Any) -> bool:
    returns = func._schema.returns
    return len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write
