"""What an operation makes of miniatures tells what it makes of the tensors that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from nucleate.deferred.recording.miniatures import result_on_miniatures
from nucleate.deferred.tape.leaves import tensors
from tests.deferred.layouts import broadcast, laid_out, looks, shape

aten = torch.ops.aten
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def told(func: Any, *args: Any, **kwargs: Any) -> Any:
    return result_on_miniatures(func, args, kwargs, tensors((args, kwargs)))


def elementwise() -> list[Any]:
    """Return every elementwise operation of torch whose arguments can be told from its schema."""
    packets = (getattr(aten, name) for name in dir(aten))
    overloads = (
        getattr(packet, name) for packet in packets if hasattr(packet, "overloads") for name in packet.overloads()
    )
    return sorted((func for func in overloads if torch.Tag.pointwise in func.tags), key=str)


DTYPES = (
    *[torch.float32] * 4, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.complex64,
)  # fmt: skip
NUMBERS: dict[str, Any] = {"number": 2, "int": 1, "float": 1.5, "bool": False, "str": "none", "Optional[number]": 1}


def call(func: Any, random: Random) -> Call:
    """Return a call of an elementwise operation on tensors that broadcast."""
    lengths, dtype = shape(random), random.choice(DTYPES)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in func._schema.arguments:
        kind = str(argument.type)
        value: Any
        if kind == "Optional[Tensor]" and random.random() < 0.5:
            value = None
        elif kind in ("Tensor", "Optional[Tensor]"):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            own = dtype if argument.is_out or random.random() < 0.7 else random.choice(DTYPES)
            value = laid_out(random, lengths if is_written else broadcast(random, lengths), own)
        elif argument.has_default_value():
            continue
        else:
            value = NUMBERS.get(kind, "floor")
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return func, tuple(args), kwargs


def is_doubtful(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether torch warns of a resized `out=`, or refuses to write what elements share."""
    outs = [kwargs[argument.name] for argument in func._schema.arguments if argument.is_out]
    given = tensors((args, kwargs))
    inputs = [tensor.shape for tensor in given if not any(tensor is out for out in outs)]
    resized = any(out.shape != torch.broadcast_shapes(*inputs) for out in outs)
    return resized or (func._schema.is_mutable and any(0 in tensor.stride() for tensor in given))


@pytest.mark.filterwarnings("ignore")  # of casts that drop imaginary parts, and the like
@pytest.mark.parametrize("seed", range(12))
def test_every_elementwise_operation_is_told_as_torch_does_it(seed: int) -> None:
    random = Random(seed)
    num_told = 0
    funcs = elementwise()
    for func in funcs:
        _, args, kwargs = call(func, random)
        if is_doubtful(func, args, kwargs):
            continue
        try:
            actual = told(func, *args, **kwargs)
        except Exception as error:
            with pytest.raises(type(error)):
                func(*args, **kwargs)
            continue
        if actual is not None:
            num_told += 1
            assert looks(actual) == looks(func(*args, **kwargs)), func
    assert len(funcs) > 300
    assert num_told > 0.4 * len(funcs)


def matrix(*shape: int) -> Tensor:
    return torch.ones(shape)


def index(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


CALLS: dict[str, Callable[[], Call]] = {
    "mm": lambda: (aten.mm.default, (matrix(4, 6), matrix(6, 9)), {}),
    "mm, transposed": lambda: (aten.mm.default, (matrix(6, 4).t(), matrix(6, 6)), {}),
    "mm, doubles": lambda: (aten.mm.default, (matrix(4, 6).double(), matrix(6, 4).double()), {}),
    "mm, bf16": lambda: (aten.mm.default, (matrix(4, 6).bfloat16(), matrix(6, 4).bfloat16()), {}),
    "bmm": lambda: (aten.bmm.default, (matrix(3, 4, 6), matrix(3, 6, 1)), {}),
    "mv": lambda: (aten.mv.default, (matrix(4, 6), matrix(6)), {}),
    "dot": lambda: (aten.dot.default, (matrix(6), matrix(6)), {}),
    "vdot": lambda: (aten.vdot.default, (matrix(6), matrix(6)), {}),
    "addmm": lambda: (aten.addmm.default, (matrix(9), matrix(4, 6), matrix(6, 9)), {}),
    "addmv": lambda: (aten.addmv.default, (matrix(4), matrix(4, 6), matrix(6)), {}),
    "baddbmm": lambda: (aten.baddbmm.default, (matrix(3, 4, 9), matrix(3, 4, 6), matrix(3, 6, 9)), {}),
    "tall QR": lambda: (aten.linalg_qr.default, (matrix(9, 4),), {}),
    "wide QR": lambda: (aten.linalg_qr.default, (matrix(4, 9),), {}),
    "square QR": lambda: (aten.linalg_qr.default, (matrix(6, 6),), {}),
    "whole QR": lambda: (aten.linalg_qr.default, (matrix(3, 9, 4), "complete"), {}),
    "R of QR": lambda: (aten.linalg_qr.default, (matrix(9, 4), "r"), {}),
    "Householder": lambda: (aten.linalg_householder_product.default, (matrix(9, 4), matrix(4)), {}),
    "matrix exponential": lambda: (aten.linalg_matrix_exp.default, (matrix(2, 5, 5),), {}),
    "solve": lambda: (aten._linalg_solve_ex.default, (matrix(4, 4), matrix(4, 6)), {}),
    "sum": lambda: (aten.sum.default, (matrix(4, 6),), {}),
    "sum of integers": lambda: (aten.sum.dim_IntList, (index(4, 6), [0]), {}),
    "sum, kept": lambda: (aten.sum.dim_IntList, (matrix(4, 6, 9), [0, -1], True), {}),
    "sum, as doubles": lambda: (aten.sum.dim_IntList, (matrix(4, 6), [0]), {"dtype": torch.float64}),
    "mean": lambda: (aten.mean.dim, (matrix(4, 6).t(), [1]), {}),
    "std": lambda: (aten.std.correction, (matrix(4, 6), [1]), {"correction": 0, "keepdim": True}),
    "var and mean": lambda: (aten.var_mean.correction, (matrix(4, 6), [0]), {"correction": 1}),
    "var": lambda: (aten.var.correction, (matrix(4, 6),), {}),
    "amax": lambda: (aten.amax.default, (matrix(4, 6), [0]), {}),
    "max": lambda: (aten.max.dim, (matrix(4, 6), 0), {}),
    "min, kept": lambda: (aten.min.dim, (matrix(4, 6), 1, True), {}),
    "argmax": lambda: (aten.argmax.default, (matrix(4, 6), 1), {}),
    "argmax of all": lambda: (aten.argmax.default, (matrix(4, 6),), {}),
    "any": lambda: (aten.any.dim, (matrix(4, 6) > 0, 1), {}),
    "prod": lambda: (aten.prod.dim_int, (matrix(4, 6), 1), {}),
    "logsumexp": lambda: (aten.logsumexp.default, (matrix(4, 6), [1]), {}),
    "norm": lambda: (aten.norm.ScalarOpt_dim, (matrix(4, 6, 3), 2, [1, 2], True), {}),
    "norm of all": lambda: (aten.norm.Scalar, (matrix(4, 6), 2), {}),
    "vector norm": lambda: (aten.linalg_vector_norm.default, (matrix(4, 6), 2, [0], True), {}),
    "vector norm of complex": lambda: (aten.linalg_vector_norm.default, (matrix(4, 6).to(torch.complex64),), {}),
    "weight norm": lambda: (aten._weight_norm_interface.default, (matrix(4, 6, 3), matrix(4, 1, 1)), {}),
    "weight norm, last": lambda: (aten._weight_norm_interface.default, (matrix(4, 6), matrix(1, 6), 1), {}),
    "tril": lambda: (aten.tril.default, (matrix(9, 6), -1), {}),
    "triu, permuted": lambda: (aten.triu.default, (matrix(9, 6, 4).permute(2, 0, 1),), {}),
    "tril_": lambda: (aten.tril_.default, (matrix(9, 6),), {}),
    "flip": lambda: (aten.flip.default, (matrix(4, 6).t(), [0]), {}),
    "roll": lambda: (aten.roll.default, (matrix(4, 6), [5, 1], [0, 1]), {}),
    "cumsum": lambda: (aten.cumsum.default, (matrix(4, 6).t(), 0), {}),
    "cumsum of integers": lambda: (aten.cumsum.default, (index(4, 6).int(), 0), {}),
    "cumprod": lambda: (aten.cumprod.default, (matrix(4, 6), 1), {}),
    "softmax": lambda: (aten._softmax.default, (matrix(4, 6), 1, False), {}),
    "log softmax": lambda: (aten._log_softmax.default, (matrix(4, 6), -1, False), {}),
    "polar": lambda: (aten.polar.default, (matrix(4, 6), matrix(4, 6)), {}),
    "complex": lambda: (aten.complex.default, (matrix(4, 6).double(), matrix(6).double()), {}),
    "masked_fill_": lambda: (aten.masked_fill_.Scalar, (matrix(4, 6), matrix(6) > 0, 3.0), {}),
    "fill_": lambda: (aten.fill_.Tensor, (matrix(4, 6), torch.tensor(2.0)), {}),
    "empty_like": lambda: (aten.empty_like.default, (matrix(4, 6, 3).permute(1, 2, 0),), {}),
    "zeros_like": lambda: (aten.zeros_like.default, (matrix(4, 6),), {"dtype": torch.int16}),
    "ones_like, contiguous": lambda: (
        aten.ones_like.default, (matrix(4, 6).t(),), {"memory_format": torch.contiguous_format},
    ),
    "full_like": lambda: (aten.full_like.default, (matrix(4, 6), 2.0), {"device": torch.device("cpu")}),
    "lookup": lambda: (aten.index.Tensor, (matrix(4, 6, 3), [index(9), None, index(9)]), {}),
    "lookup of pairs": lambda: (aten.index.Tensor, (matrix(6, 4), [index(9, 3)]), {}),
    "embedding": lambda: (aten.embedding.default, (matrix(9, 4), index(6, 3)), {}),
    "hardswish": lambda: (aten.hardswish.default, (matrix(6, 4).t(),), {}),
    "prelu": lambda: (aten._prelu_kernel.default, (matrix(4, 6), matrix(6)), {}),
    "scatter": lambda: (aten.scatter.src, (matrix(9, 6), 0, index(4, 6), matrix(4, 6)), {}),
    "scatter_": lambda: (aten.scatter_.value, (matrix(9, 6), 0, index(4, 6), 1.0), {}),
    "scatter_add": lambda: (aten.scatter_add.default, (matrix(9, 6), 0, index(4, 6), matrix(4, 6)), {}),
    "index_copy_": lambda: (aten.index_copy_.default, (matrix(9, 6), 0, index(4), matrix(4, 6)), {}),
    "index_add": lambda: (aten.index_add.default, (matrix(9, 6), 1, index(4), matrix(9, 4)), {}),
    "index_fill": lambda: (aten.index_fill.int_Scalar, (matrix(9, 6), 1, index(4), 2.0), {}),
    "inverse": lambda: (aten.linalg_inv_ex.default, (matrix(3, 6, 6),), {}),
    "Cholesky": lambda: (aten.linalg_cholesky_ex.default, (matrix(3, 6, 6),), {}),
    "determinant": lambda: (aten._linalg_det.default, (matrix(3, 6, 6),), {}),
    "log of determinant": lambda: (aten._linalg_slogdet.default, (matrix(6, 6),), {}),
    "eigenvectors": lambda: (aten._linalg_eigh.default, (matrix(3, 6, 6),), {}),
    "trace": lambda: (aten.trace.default, (matrix(4, 6),), {}),
    "distances": lambda: (aten._cdist_forward.default, (matrix(3, 4, 6), matrix(3, 9, 6), 2.0, None), {}),
    "sum of a slice": lambda: (aten.sum.dim_IntList, (matrix(9, 6)[:, ::2], [1]), {}),
    "slices joined by a product": lambda: (aten.mul.Tensor, (matrix(9, 6)[1:, :4], matrix(8, 9)[:, 3:7]), {}),
    "gather": lambda: (aten.gather.default, (matrix(9, 4), 0, index(6, 4)), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_other_operations_are_told_as_torch_does_them(name: str) -> None:
    func, args, kwargs = CALLS[name]()
    actual = told(func, *args, **kwargs)
    assert actual is not None
    assert looks(actual) == looks(func(*args, **kwargs))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "R of QR"])
def test_they_are_told_as_torchs_own_meta_kernels_do_it(name: str) -> None:
    func, args, kwargs = CALLS[name]()

    def on_meta(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        if isinstance(value, (list, tuple)):
            return type(value)(map(on_meta, value))
        return torch.device("meta") if isinstance(value, torch.device) else value

    expected = func(*on_meta(args), **{key: on_meta(value) for key, value in kwargs.items()})
    assert looks(told(func, *args, **kwargs)) == looks(expected)


def test_reductions_are_told_for_every_layout() -> None:
    random = Random(3)
    num_told = 0
    for _ in range(200):
        lengths = shape(random, least=1)
        tensor = laid_out(random, lengths)
        dims = random.sample(range(len(lengths)), random.randint(1, len(lengths)))
        kept = random.random() < 0.5
        for func, *args in (
            (aten.sum.dim_IntList, dims, kept),
            (aten.mean.dim, dims, kept),
            (aten.amax.default, dims, kept),
            (aten.linalg_vector_norm.default, 2, dims, kept),
        ):
            actual = told(func, tensor, *args)
            if actual is not None:
                num_told += 1
                assert looks(actual) == looks(func(tensor, *args)), (func, tensor.shape, tensor.stride())
    assert num_told > 400


def test_an_argument_that_is_written_is_the_result() -> None:
    tensor, factor = torch.empty(40, 60, device="meta"), torch.ones(60)
    assert told(aten.mul_.Tensor, tensor, factor) is tensor
    out = torch.empty(40, 60, device="meta")
    assert told(aten.div.out, tensor, factor, out=out) is out


def test_the_largest_tensors_take_no_memory() -> None:
    huge = torch.empty(1 << 30, 1 << 30, device="meta")
    assert looks(told(aten.mul.Tensor, huge, huge.t())) == looks(huge)
    assert looks(told(aten.mm.default, huge, huge)) == looks(huge)
    assert looks(told(aten.sum.dim_IntList, huge, [1])) == looks(torch.empty(1 << 30, device="meta"))


def test_an_error_is_the_one_that_torch_raises() -> None:
    with pytest.raises(RuntimeError, match="must match"):
        told(aten.add.Tensor, torch.ones(30, 40), torch.ones(30))
    with pytest.raises(RuntimeError, match="can't be cast"):
        told(aten.add_.Tensor, torch.zeros(30, dtype=torch.int64), torch.ones(30))
    with pytest.raises(IndexError):
        told(aten.cumsum.default, torch.ones(30), 1)
    with pytest.raises(NotImplementedError, match="not implemented for"):
        told(aten.atan2.default, torch.ones(30).to(torch.complex64), torch.ones(30))


@pytest.mark.parametrize(
    "call",
    [
        (aten.nonzero.default, (torch.ones(3, 4),), {}),
        (aten.index.Tensor, (torch.ones(3, 4), [torch.ones(3) > 0]), {}),
        (aten.cat.default, ([torch.ones(3, 4), torch.ones(2, 4)],), {}),
        (aten.rand_like.default, (torch.ones(3, 4),), {}),
        (aten.std.correction, (torch.ones(9),), {"correction": 2}),
        (aten.add.Tensor, (torch.ones(3, 0), 1), {}),
        (aten.add.Tensor, (torch.ones(8).unfold(0, 4, 2), 1), {}),
        (aten.add.out, (torch.ones(3, 4), 1), {"out": torch.empty(4)}),
        (aten.mm.out, (torch.ones(3, 4), torch.ones(4, 3)), {"out": torch.empty(4)}),
    ],
    ids=lambda call: str(call[0]),
)
def test_what_miniatures_do_not_tell_is_left_to_others(call: Call) -> None:
    func, args, kwargs = call
    assert told(func, *args, **kwargs) is None


def test_many_lengths_are_left_to_others() -> None:
    assert told(aten.add.Tensor, torch.empty(*range(2, 12), device="meta"), 1) is None
    # The first six primes have too large a product.
    assert told(aten.add.Tensor, torch.empty(*range(2, 8), device="meta"), 1) is None
