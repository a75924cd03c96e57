"""Indices and overlaps are checked while a constructor can still catch the error: meta kernels do not look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred.tape import tensors

aten = torch.ops.aten

_BY_LIST = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index_put}
_PUTS = _BY_LIST - {aten.index}
_BY_DIM = {
    aten.index_select, aten.index_add, aten.index_add_, aten.index_copy, aten.index_copy_, aten.index_fill,
    aten.index_fill_,
}  # fmt: skip
_BY_ELEMENT = {
    aten.gather, aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_, aten.scatter_reduce,
    aten.scatter_reduce_,
}  # fmt: skip
_FLAT = {aten.take, aten.put, aten.put_}

CHECKED = {*_BY_LIST, *_BY_DIM, *_BY_ELEMENT, *_FLAT, aten.embedding}


def check_bounds(func: Any, args: tuple[Any, ...], value: Callable[[Tensor], Tensor]) -> None:
    """Run the lookup of an indexed operation on one element that stands for all.

    Args:
        func: An overload of an operation in `CHECKED`.
        args: Its positional arguments.
        value: Gives the value of a deferred tensor.

    Raises:
        IndexError: As torch raises it, and likewise other classes.
        RuntimeError: What is put has another dtype.
    """
    packet = func.overloadpacket
    if packet in _PUTS and args[2].dtype != args[0].dtype:
        raise RuntimeError(
            f"Index put requires the source and destination dtypes match, got {args[0].dtype} for the destination and "
            f"{args[2].dtype} for the source."
        )
    places = args[1:2] if packet in (*_BY_LIST, *_FLAT, aten.embedding) else args[2:3]
    if any(tensor.dtype in (torch.bool, torch.uint8) or tensor.numel() == 0 for tensor in tensors(places)):
        return  # Masks are looked at anyway.
    # On the CPU: a device may end the process where an index is out of range.
    target = torch.zeros((), device="cpu").expand(args[0].size())
    if packet in _BY_LIST:
        aten.index(target, [None if index is None else value(index).cpu() for index in args[1]])
    elif packet in _BY_DIM:
        aten.index_select(target, args[1], value(args[2]).cpu())
    elif packet in _BY_ELEMENT:
        aten.gather(target, args[1], value(args[2]).cpu())
    elif packet in _FLAT:
        aten.take(target, value(args[1]).cpu())
    else:
        aten.embedding(target, value(args[1]).cpu())


def refuse_overlap(written: Iterable[Tensor]) -> None:
    """Refuse to fill a tensor with random numbers if several of its elements share memory, as after `expand`.

    Raises:
        RuntimeError: As torch raises it (`assert_no_internal_overlap` in aten/src/ATen/MemoryOverlap.cpp, 2.13).
    """
    if any(torch._debug_has_internal_overlap(tensor) == 1 for tensor in written):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the tensor before performing the operation."
        )
