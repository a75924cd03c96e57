"""Miniatures: small tensors that stand for large ones, on which an operation shows the geometry of its result.

A miniature has primes for lengths: a smaller prime for a smaller length, one prime for equal lengths. Dims of one
element stay as they are. The dims have the same order in memory and the same gaps between them. So the operation takes
the same path through its kernel. The prime factors of each length and stride of the result tell which lengths of the
arguments it consists of. This holds for operations whose results have the lengths of their arguments, such as
elementwise operations, reductions and products of matrices. It costs microseconds, even for large tensors. In contrast,
the first of torch's own meta kernels for these operations imports torch's symbolic shapes and its compiler, which takes
a second.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred.recording.op_schema import schema_of
from nucleate.deferred.tape.leaves import map_leaves

aten = torch.ops.aten

#: The most elements that the miniatures of one call have.
LIMIT_NUMEL = 1 << 14

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23)

_LIKE_THEIR_ARGUMENT = {
    aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.fill, aten.tril, aten.triu, aten.tril_,
    aten.triu_, aten.masked_fill_, aten.fill_, aten.flip, aten.roll, aten.cumsum, aten.cumprod, aten._softmax,
    aten._log_softmax, aten.polar, aten.complex, aten.hardswish, aten._prelu_kernel,
}  # fmt: skip
_REDUCTIONS = {
    aten.sum, aten.mean, aten.prod, aten.var, aten.std, aten.var_mean, aten.std_mean, aten.amax, aten.amin, aten.max,
    aten.min, aten.argmax, aten.argmin, aten.any, aten.all, aten.logsumexp, aten.norm, aten.linalg_vector_norm,
    aten._weight_norm_interface,
}  # fmt: skip
_OF_MATRICES = {
    aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot, aten.addmm, aten.addmv, aten.baddbmm, aten.linalg_qr,
    aten.linalg_householder_product, aten.linalg_matrix_exp, aten._linalg_solve_ex, aten.linalg_inv_ex,
    aten.linalg_cholesky_ex, aten._linalg_det, aten._linalg_slogdet, aten._linalg_eigh, aten.trace,
    aten._cdist_forward,
}  # fmt: skip
# Operations whose integer tensors hold indices.
_INDEXED = {
    aten.index, aten.embedding, aten.gather, aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_,
    aten.index_copy, aten.index_copy_, aten.index_add, aten.index_add_, aten.index_fill, aten.index_fill_,
}  # fmt: skip
# A miniature may have two elements. torch then warns if `correction` is more than one.
_DEVIATIONS = {aten.var, aten.std, aten.var_mean, aten.std_mean}
# Operations whose meta kernels are written in C++.
_IN_CPP = {aten.clone}
_KNOWN = _LIKE_THEIR_ARGUMENT | _REDUCTIONS | _OF_MATRICES | _INDEXED
# Dtypes of masks. Kernels pick rows by a mask, so the shape of the result depends on how many elements are true.
_MASKS = (torch.bool, torch.uint8)


def result_on_miniatures(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]) -> Any:
    """Return an operation's result as meta tensors. Arguments that it returns are returned unchanged.

    Args:
        func: The aten overload.
        args: Its positional arguments; plain tensors on any device.
        kwargs: Its keyword arguments.
        given: The tensors among both.

    Returns:
        The result, or None if miniatures cannot show it.

    Raises:
        Exception: The operation's error for miniatures, and so for its arguments. The message has other lengths.
    """
    packet = func.overloadpacket
    if packet in _DEVIATIONS and kwargs.get("correction") not in (None, 0, 1):
        return None
    if not _is_known(func) or (packet in _INDEXED and any(tensor.dtype in _MASKS for tensor in given[1:])):
        return None
    scale = _Scale.of(given)
    if scale is None or _resizes(func, given, kwargs):
        return None
    strides: dict[int, list[int]] = {}
    for tensor in given:
        small = scale.down_strides(tensor)
        if small is None:
            return None
        strides[id(tensor)] = small
    originals: dict[int, tuple[Tensor, Tensor]] = {}
    made: dict[int, Tensor] = {}

    def miniature(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return torch.device("cpu") if isinstance(leaf, torch.device) else leaf
        if id(leaf) not in made:
            like = torch.empty_strided(scale.down(leaf.size()), strides[id(leaf)], dtype=leaf.dtype)
            # Zero is a valid index in every dim. One divides every number.
            made[id(leaf)] = like.fill_(0 if packet in _INDEXED else 1)
            originals[id(like)] = like, leaf
        return made[id(leaf)]

    result = func(*map_leaves(args, miniature), **map_leaves(kwargs, miniature))

    def enlarged(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in originals:
            return originals[id(leaf)][1]
        return torch.empty_strided(scale.up(leaf.size()), scale.up(leaf.stride()), dtype=leaf.dtype, device="meta")

    return map_leaves(result, enlarged)


def _is_known(func: Any) -> bool:
    """Return whether an operation's result has the lengths of its arguments."""
    if torch.Tag.nondeterministic_seeded in func.tags or func.overloadpacket in _IN_CPP:
        return False
    if torch.Tag.pointwise in func.tags:
        return True
    return func.overloadpacket in _KNOWN and not any(is_out for _, _, is_out in schema_of(func).mutated)


def _resizes(func: Any, given: list[Tensor], kwargs: dict[str, Any]) -> bool:
    """Return whether an elementwise operation changes the shape of its `out=`. torch warns if it does."""
    outs = [kwargs[name] for _, name, is_out in schema_of(func).mutated if is_out]
    if not outs:
        return False
    shapes = [tensor.size() for tensor in given if not any(tensor is out for out in outs)]
    longest = max((len(shape) for shape in shapes), default=0)
    padded = [(1,) * (longest - len(shape)) + tuple(shape) for shape in shapes]
    shape = tuple(max(lengths) for lengths in zip(*padded, strict=True))
    return any(tuple(out.size()) != shape for out in outs)


class _Scale:
    """The primes that stand for the lengths of some tensors.

    Args:
        lengths: All lengths except 1, ascending.
    """

    def __init__(self, lengths: list[int]) -> None:
        self._down = dict(zip(lengths, _PRIMES, strict=False))
        self._up = {prime: length for length, prime in self._down.items()}

    @staticmethod
    def of(given: list[Tensor]) -> _Scale | None:
        """Return the scale for tensors, or None if they have no miniatures."""
        lengths = {length for tensor in given for length in tensor.size()} - {1}
        if not given or 0 in lengths or len(lengths) > len(_PRIMES):
            return None
        scale = _Scale(sorted(lengths))
        numel = sum(math.prod(scale.down(tensor.size())) for tensor in given)
        return scale if numel <= LIMIT_NUMEL else None

    def down(self, lengths: torch.Size) -> tuple[int, ...]:
        """Return the lengths of a miniature."""
        return tuple(self._down.get(length, 1) for length in lengths)

    def down_strides(self, tensor: Tensor) -> list[int] | None:
        """Return strides that place the dims of a tensor's miniature in memory in the same order, with the same gaps.

        Returns:
            The strides, or None if elements overlap.
        """
        steps = {0: 0}
        end = small_end = 1
        dims = sorted(zip(tensor.stride(), tensor.size(), strict=True))
        for stride, length in dims:
            if length == 1 or stride == 0:
                continue
            if stride < end:
                return None
            # Every gap is one element here, because no result takes over the size of a gap.
            steps[end], steps[stride] = small_end, small_end + (stride > end)
            end, small_end = stride * length, steps[stride] * self._down[length]
        # The stride of a dim of one element may point to the end of the memory.
        steps[end] = small_end
        small = [steps.get(stride) for stride in tensor.stride()]
        return None if None in small else small  # type: ignore[return-value]

    def up(self, numbers: tuple[int, ...]) -> list[int]:
        """Return the lengths or strides whose miniatures are these numbers."""
        return [self._enlarged(number) for number in numbers]

    def _enlarged(self, number: int) -> int:
        result = 1 if number else 0
        for prime, length in self._up.items():
            while number and number % prime == 0:
                number //= prime
                result *= length
        if number > 1:
            raise NotImplementedError("a length or stride that is not a product of the arguments' lengths")
        return result
