"""Facts about aten operations: their reads and writes, whether they draw, and the errors that meta kernels miss.

They are read once from the operation's schema. Where the schema says too little, the operations are listed here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred.tape.leaves import tensors
from nucleate.deferred.tape.steps import TensorRef
from nucleate.deferred.tape.tape import Tape

aten = torch.ops.aten

# In-place operations that do not read the old content (`self` is only written).
_FILLS = {
    aten.zero_, aten.fill_, aten.copy_, aten.normal_, aten.uniform_, aten.random_, aten.bernoulli_,
    aten.exponential_, aten.log_normal_, aten.cauchy_, aten.geometric_,
}  # fmt: skip
# These open files, which may be gone later.
_REAL = {aten.from_file}
_EMPTY = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.empty_permuted}
# These change the memory of a tensor, not a value. The geometry of the surviving tensor holds the whole effect.
_RETARGET = {aten.set_, aten.resize_}
# These update running statistics, but their schemas do not say so (aten/src/ATen/native/native_functions.yaml).
_WRITES_STATISTICS = {aten.native_batch_norm, aten.cudnn_batch_norm, aten.miopen_batch_norm}
# Their meta kernels are wrong about strides, shapes or dtypes (torch 2.13), so they run for real to find the geometry.
_WRONG_ON_META = {
    "_linalg_svd", "linalg_eig", "_linalg_eig", "_fft_r2c", "_fft_c2c", "_fft_c2r", "max_unpool2d", "max_unpool3d",
    "nonzero_static", "quantize_per_tensor", "quantize_per_channel", "quantize_per_tensor_dynamic",
    "native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update", "_batch_norm_no_update",
    "_embedding_bag_forward_only", "_embedding_bag", "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
    "sort",
}  # fmt: skip
# These refuse arguments by their values. Moving the generator takes a real run anyway.
_REFUSING = {"multinomial", "bernoulli", "poisson", "binomial", "_standard_gamma", "_sample_dirichlet"}
# The answers of these follow from shapes and dtypes.
_GEOMETRIC = {
    aten.is_same_size,
    aten.sym_size,
    aten.sym_stride,
    aten.sym_numel,
    aten.sym_storage_offset,
    aten.is_complex,
}


# Operations that look elements up by indices. Their meta kernels do not check the indices.
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


class OpSchema:
    """The facts that a recorder needs about an operation, read once from its schema."""

    __slots__ = (
        "device", "fills", "indexes", "is_composite", "is_random", "looks_at_values", "mutated", "retargets",
        "uninitialized", "wrong_on_meta",
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
        #: Whether autograd splits it into other operations, so that only inference mode shows it to a dispatch mode.
        self.is_composite = _has_kernel(func, "CompositeImplicitAutograd") and not _has_kernel(func, "Meta")
        self.is_random = torch.Tag.nondeterministic_seeded in func.tags
        self.fills = packet in _FILLS
        self.uninitialized = packet in _EMPTY
        self.retargets = packet in _RETARGET
        # A result that is not a tensor is an answer for Python. So is a check without a result. Both look at values.
        returns = [argument.type for argument in func._schema.returns]
        answers = not self.mutated and not any("Tensor" in str(kind) for kind in returns) and packet not in _GEOMETRIC
        name = packet.__name__
        self.looks_at_values = answers or name in _REFUSING
        self.wrong_on_meta = name in _WRONG_ON_META
        self.indexes = packet in CHECKED
        self.device = any(argument.name == "device" for argument in arguments) and packet not in _REAL


schema_of = functools.cache(OpSchema)


def _has_kernel(func: torch._ops.OpOverload[Any, Any], key: str) -> bool:
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))
    except RuntimeError:
        return False  # The dispatcher does not know operations of TorchScript, such as `prim::device`.


# -- reads and writes of one call ----------------------------------------------------------------------------


def written_by(schema: OpSchema, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that a call writes."""
    found: list[Tensor] = []
    for position, name, _ in schema.mutated:
        value = args[position] if position < len(args) else kwargs.get(name)
        found.extend(tensors(value))
    return found


def read_by(schema: OpSchema, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors whose content matters to a call: all arguments except those that it only writes."""
    if not schema.mutated:
        yield from tensors((args, kwargs))
        return
    blind = {position for position, name, is_out in schema.mutated if is_out or (schema.fills and name == "self")}
    yield from tensors([arg for index, arg in enumerate(args) if index not in blind])
    outs = {name for _, name, is_out in schema.mutated if is_out}
    yield from tensors([arg for name, arg in kwargs.items() if name not in outs])


def needed_by(tape: Tape, read: Iterable[Tensor], written: Iterable[TensorRef]) -> tuple[int, ...]:
    """Return the storages whose content a call needs.

    Args:
        tape: The tape.
        read: The tensors whose content matters.
        written: The deferred tensors that the call writes.
    """
    numbers = (tape.number(tensor) for tensor in read)
    needed = dict.fromkeys(number for number in numbers if number is not None)
    for ref in written:
        # A write to a part keeps the rest.
        if not ref.fills(tape.size_bytes(ref.storage)):
            needed[ref.storage] = None
    return tuple(needed)


def overwritten_by(
    tape: Tape, schema: OpSchema, written: tuple[TensorRef, ...], reads: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the storages whose old content a call replaces entirely without reading it."""
    if not (schema.fills or any(is_out for _, _, is_out in schema.mutated)):
        return ()
    return tuple(ref.storage for ref in written if ref.storage not in reads and ref.fills(tape.size_bytes(ref.storage)))


# -- errors that meta kernels miss ---------------------------------------------------------------------------


def check_bounds(func: Any, args: tuple[Any, ...], value: Callable[[Tensor], Tensor]) -> None:
    """Run the lookup of an indexed operation on one element that stands for all elements.

    Args:
        func: An overload of an operation in `CHECKED`.
        args: Its positional arguments.
        value: The function that returns the value of a deferred tensor.

    Raises:
        IndexError: An index is out of range. torch raises other classes likewise.
        RuntimeError: The source and the destination have different dtypes.
    """
    packet = func.overloadpacket
    if packet in _PUTS and args[2].dtype != args[0].dtype:
        raise RuntimeError(
            f"Index put requires the source and destination dtypes match, got {args[0].dtype} for the destination and "
            f"{args[2].dtype} for the source."
        )
    places = args[1:2] if packet in (*_BY_LIST, *_FLAT, aten.embedding) else args[2:3]
    if any(tensor.dtype in (torch.bool, torch.uint8) or tensor.numel() == 0 for tensor in tensors(places)):
        return  # Masks are read anyway.
    # On the CPU, because another device may end the process if an index is out of range.
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
        RuntimeError: torch's own error (`assert_no_internal_overlap` in aten/src/ATen/MemoryOverlap.cpp, 2.13).
    """
    if any(torch._debug_has_internal_overlap(tensor) == 1 for tensor in written):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the tensor before performing the operation."
        )
