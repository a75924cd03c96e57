"""Shapes that are read from numbers among the arguments are those that torch gives."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch

from nucleate.deferred.recording.sized import result_of_sizes
from nucleate.deferred.tape.leaves import tensors
from tests.deferred.layouts import laid_out, looks, shape

aten = torch.ops.aten
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def told(func: Any, *args: Any, **kwargs: Any) -> Any:
    return result_of_sizes(func, args, kwargs, tensors((args, kwargs)))


FACTORIES: list[Call] = [
    (aten.randn.default, ([3, 4],), {}),
    (aten.randn.default, ([],), {"dtype": torch.complex64}),
    (aten.randn.generator, ([3, 4],), {"generator": torch.Generator(), "dtype": torch.float64}),
    (aten.normal.float_float, (0.0, 2.0, [3, 4]), {}),
    (aten.randint.default, (9, [3, 4]), {}),
    (aten.randint.low, (2, 9, [3, 4]), {"dtype": torch.int32}),
    (aten.rand_like.default, (torch.ones(4, 3).t(),), {}),
    (aten.randn_like.default, (torch.ones(4, 3),), {"dtype": torch.bfloat16}),
    (aten.eye.default, (5,), {}),
    (aten.eye.default, (0,), {"dtype": torch.bool}),
    (aten.eye.m, (5, 3), {"dtype": torch.float64}),
    (aten.arange.default, (5,), {}),
    (aten.arange.default, (5.5,), {}),
    (aten.arange.start, (2, 50000), {"dtype": torch.float16}),
    (aten.arange.start_step, (9, 2, -3), {}),
    (aten.arange.start_step, (0, 1, 0.1), {}),
    (aten.linspace.default, (0, 1, 50000), {}),
    (aten.logspace.default, (0, 1, 7), {}),
    (aten.tril_indices.default, (5, 6), {}),
    (aten.triu_indices.default, (5, 6, 2), {}),
    (aten.hann_window.default, (12,), {}),
    (aten.hann_window.periodic, (12, False), {"dtype": torch.float64}),
    (aten.kaiser_window.beta, (12, True, 3.0), {}),
]


@pytest.mark.parametrize("call", FACTORIES, ids=lambda call: f"{call[0]}{call[1]}")
def test_a_factory_makes_what_is_told(call: Call) -> None:
    func, args, kwargs = call
    state = torch.get_rng_state()
    actual = told(func, *args, **kwargs, device=torch.device("meta"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(tensor.is_meta for tensor in tensors(actual))
    assert looks(actual) == looks(func(*args, **kwargs))


def test_joined_and_repeated_tensors_have_the_shape_that_is_told() -> None:
    random = Random(5)
    num_told = 0
    for _ in range(400):
        lengths = shape(random, least=1)
        maker = [laid_out(random, lengths) for _ in range(random.randint(1, 3))]
        dim = random.randrange(-len(lengths), len(lengths))
        repeats = [random.randint(1, 3) for _ in range(len(lengths) + random.randint(0, 1))]
        for func, *args in (
            (aten.cat.default, maker, dim),
            (aten.stack.default, maker, dim),
            (aten.repeat.default, maker[0], repeats),
            (aten.topk.default, maker[0], 1, dim),
            (aten.diag_embed.default, maker[0], dim),
        ):
            actual = told(func, *args)
            if actual is not None:
                num_told += 1
                assert looks(actual) == looks(func(*args)), (func, [piece.stride() for piece in maker])
    assert num_told > 1000


def test_pieces_of_other_lengths_are_joined() -> None:
    maker = [torch.ones(2, 3, 4), torch.ones(2, 1, 4), torch.ones(2, 5, 4)]
    assert looks(told(aten.cat.default, maker, 1)) == looks(torch.cat(maker, 1))


def test_a_unit_matrix_is_written_where_it_fits() -> None:
    out = torch.empty(4, 5, device="meta")
    assert told(aten.eye.m_out, 4, 5, out=out) is out
    assert told(aten.eye.m_out, 5, 5, out=out) is None


@pytest.mark.parametrize(
    "call",
    [
        (aten.randn.default, ([3],), {"dtype": torch.int64}),
        (aten.normal.float_float, (0.0, -1.0, [3]), {}),
        (aten.randint.default, (0, [3]), {}),
        (aten.linspace.default, (0, 1, 5), {"dtype": torch.uint16}),
    ],
    ids=lambda call: str(call[0]),
)
def test_wrong_arguments_are_refused_as_torch_refuses_them(call: Call) -> None:
    func, args, kwargs = call
    with pytest.raises((RuntimeError, NotImplementedError)) as expected:
        func(*args, **kwargs)
    with pytest.raises(type(expected.value)) as actual:
        told(func, *args, **kwargs)
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize(
    "call",
    [
        (aten.arange.start_step, (0, 1, 1e-9), {}),
        (aten.arange.start_step, (0, 5, 0), {}),
        (aten.arange.default, (1 << 40,), {}),
        (aten.linspace.default, (0, 1, 1 << 30), {}),
        (aten.eye.default, (-1,), {}),
        (aten.rand_like.default, (torch.ones(3, dtype=torch.int64),), {}),
        (aten.cat.default, ([torch.ones(3), torch.ones(3, dtype=torch.int64)],), {}),
        (aten.cat.default, ([torch.ones(3, 2), torch.ones(3, 3)],), {}),
        (aten.cat.default, ([torch.ones(3), torch.ones(0)],), {}),
        (aten.stack.default, ([torch.ones(3), torch.ones(2)],), {}),
        (aten.stack.default, ([torch.ones(3)], 3), {}),
        (aten.repeat.default, (torch.ones(3, 4), [2]), {}),
        (aten.topk.default, (torch.ones(3), 4), {}),
        (aten.add.Tensor, (torch.ones(3), 4), {}),
    ],
    ids=lambda call: f"{call[0]}{call[1]}"[:60],
)
def test_what_is_not_known_is_left_to_others(call: Call) -> None:
    func, args, kwargs = call
    assert told(func, *args, **kwargs) is None
