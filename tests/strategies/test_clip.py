"""Clipping on one process equals torch's own; gradients of several ranks are compared in tests/multi/test_clip.py."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from nucleate.errors import ConfigurationError, NonFiniteGradientError
from nucleate.strategies.clip import clip_by_norm, clip_by_value
from tests.device import cpu_only

pytestmark = pytest.mark.usefixtures("factories_on_device")

INF = math.inf
ORDERS = [1.0, 2.0, 3.0, 0.5, INF, -INF, 0.0, -1.0]


def with_gradients(*gradients: Tensor) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(gradient.to_dense())) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


def dense(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters with the same gradients in a form that torch can clip."""
    return with_gradients(*(parameter.grad.to_dense() for parameter in parameters))


def assert_clipped_like(parameters: list[nn.Parameter], reference: list[nn.Parameter]) -> None:
    for ours, theirs in zip(parameters, reference, strict=True):
        torch.testing.assert_close(ours.grad.to_dense(), theirs.grad)


@pytest.mark.parametrize("norm_type", ORDERS)
@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1e6])
def test_norms_and_gradients_equal_those_of_torch(norm_type: float, max_norm: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2).double())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    model[0].bias.grad = None
    reference = copy.deepcopy(model)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        theirs.grad = None if ours.grad is None else ours.grad.clone()
    expected = nn.utils.clip_grad_norm_(reference.parameters(), max_norm, norm_type)
    total = clip_by_norm(model.parameters(), max_norm, norm_type)
    torch.testing.assert_close(total.double(), expected.double())
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_without_gradients_the_norm_is_zero() -> None:
    assert clip_by_norm(nn.Linear(2, 2).parameters(), 1.0) == 0


@pytest.mark.parametrize("norm_type", [INF, 2.0, 0.0, -INF])
def test_a_gradient_without_elements_does_not_change_the_norm(norm_type: float) -> None:
    empty, full = torch.empty(0, 3), torch.tensor([2.0, -4.0])
    alone = clip_by_norm(with_gradients(full), 1e6, norm_type)
    assert clip_by_norm(with_gradients(empty, full), 1e6, norm_type) == alone
    assert clip_by_norm(with_gradients(empty), 1e6) == 0


def test_values_are_limited() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.tensor([[3.0, -3.0], [0.5, float("inf")]])
    clip_by_value(layer.parameters(), 1.0)
    assert layer.weight.grad.tolist() == [[1.0, -1.0], [0.5, 1.0]]


@pytest.mark.parametrize("bound", [-1.0, float("nan")])
def test_bounds_that_make_no_sense_are_refused(bound: float) -> None:
    with pytest.raises(ConfigurationError, match="at least 0"):
        clip_by_norm([], bound)
    with pytest.raises(ConfigurationError, match="at least 0"):
        clip_by_value([], bound)


def test_an_order_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="norm_type=nan must be a number"):
        clip_by_norm(with_gradients(torch.ones(2)), 1.0, math.nan)


# -- kinds of gradients ---------------------------------------------------------------------------------------


@cpu_only("a simulated device has no sparse kernels")
@pytest.mark.parametrize("norm_type", ORDERS)
@pytest.mark.parametrize("rows", [[3, 1, 3, 3], [0, 1, 2, 3, 4, 4]])
def test_a_sparse_gradient_is_clipped_like_a_dense_one(norm_type: float, rows: list[int]) -> None:
    torch.manual_seed(0)
    embedding, layer = nn.Embedding(5, 2, sparse=True), nn.Linear(2, 2)
    layer(embedding(torch.tensor(rows))).square().sum().backward()
    parameters = [*embedding.parameters(), *layer.parameters()]
    assert not embedding.weight.grad.is_coalesced()
    reference = dense(parameters)
    expected = nn.utils.clip_grad_norm_(reference, 0.1, norm_type)
    torch.testing.assert_close(clip_by_norm(parameters, 0.1, norm_type), expected)
    assert embedding.weight.grad.is_sparse
    assert_clipped_like(parameters, reference)


@cpu_only("a simulated device has no sparse kernels")
def test_the_values_of_a_sparse_gradient_are_limited_after_they_are_added_up() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    (embedding(torch.tensor([1, 1, 3])) * 0.7).sum().backward()
    clip_by_value(embedding.parameters(), 1.0)
    expected = torch.zeros(5, 2)
    expected[1], expected[3] = 1.0, 0.7
    torch.testing.assert_close(embedding.weight.grad.to_dense(), expected)
    torch.optim.SGD(embedding.parameters(), lr=1.0).step()


@pytest.mark.parametrize("norm_type", ORDERS)
def test_a_complex_gradient_is_clipped_by_its_absolute_values(norm_type: float) -> None:
    torch.manual_seed(0)
    parameters = with_gradients(torch.randn(3, 2, dtype=torch.complex64), torch.randn(4))
    reference = dense(parameters)
    expected = nn.utils.clip_grad_norm_(reference, 0.1, norm_type)
    torch.testing.assert_close(clip_by_norm(parameters, 0.1, norm_type), expected)
    assert_clipped_like(parameters, reference)


@pytest.mark.parametrize("conjugate", [False, True])
def test_both_parts_of_complex_values_are_limited(conjugate: bool) -> None:
    (parameter,) = with_gradients(torch.tensor([3 - 0.5j, -0.2 + 4j]))
    if conjugate:
        parameter.grad = parameter.grad.conj()
    clip_by_value([parameter], 1.0)
    expected = torch.tensor([1 - 0.5j, -0.2 + 1j])
    torch.testing.assert_close(parameter.grad, expected.conj() if conjugate else expected, check_stride=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_of_half_gradients_does_not_overflow(dtype: torch.dtype) -> None:
    (parameter,) = with_gradients(torch.full((4,), 40000.0, dtype=dtype))
    total = clip_by_norm([parameter], 1.0)
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(80000, rel=1e-2)
    assert parameter.grad.dtype == dtype
    assert float(parameter.grad[0]) == pytest.approx(0.5, rel=1e-2)


def test_a_parameter_that_is_listed_twice_counts_once() -> None:
    once, twice = with_gradients(torch.tensor([3.0, 4.0])), with_gradients(torch.tensor([3.0, 4.0]))
    assert clip_by_norm(iter([*twice, *twice]), 1.0) == clip_by_norm(once, 1.0) == 5
    assert_clipped_like(twice, once)


def test_gradients_of_several_devices_have_one_norm() -> None:
    parameters = with_gradients(torch.tensor([3.0], device="cpu"), torch.tensor([4.0]))
    assert clip_by_norm(parameters, 1.0) == 5
    assert [float(parameter.grad) for parameter in parameters] == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("norm_type", [2.0, INF, 1.0])
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_a_norm_that_is_not_finite_is_refused_before_any_gradient_changes(norm_type: float, bad: float) -> None:
    parameters = with_gradients(torch.tensor([1.0, bad]), torch.ones(2))
    held = [parameter.grad for parameter in parameters]
    with pytest.raises(NonFiniteGradientError, match="total norm of order"):
        clip_by_norm(parameters, 1e-3, norm_type)
    assert all(parameter.grad is gradient for parameter, gradient in zip(parameters, held, strict=True))
    assert parameters[1].grad.tolist() == [1, 1]
