"""Constructors whose course depends on values."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.deferred.idioms.idiom import Body, Idioms, assert_idiom_is_exact, hold

idiom = Idioms()


@idiom
def a_value_steers_the_constructor(m: Any) -> None:
    m.layer = nn.Linear(3 if torch.rand(1).item() > 0.5 else 4, 5)
    m.other = nn.Linear(2, 2) if bool(torch.randn(()) > 0) else nn.Linear(2, 3)


@idiom
def a_loop_rejects_until_a_draw_is_good(m: Any) -> None:
    while True:
        weight = torch.randn(4, 4)
        if torch.det(weight) > 1.5:
            break
    m.weight = nn.Parameter(weight)
    m.after = nn.Parameter(torch.randn(3))


@idiom
def a_loop_runs_until_values_converge(m: Any) -> None:
    matrix = torch.rand(5, 5)
    matrix = matrix @ matrix.t()
    vector = torch.rand(5)
    steps = 0
    while True:
        following = F.normalize(matrix @ vector, dim=0)
        steps += 1
        if torch.allclose(following, vector, atol=1e-6) or steps > 200:
            break
        vector = following
    hold(m, vector=vector, steps=steps)


@idiom
def a_tensor_is_true_in_if_and_while_and_not(m: Any) -> None:
    count = torch.tensor(0)
    while count < 3:
        count += 1
    hold(m, count=count)
    if not torch.zeros(1):
        m.a = nn.Parameter(torch.randn(2))
    m.b = nn.Parameter(torch.rand(1) and torch.ones(2))
    m.c = nn.Parameter(torch.ones(3) if torch.rand(5).sum() > 2 else torch.zeros(4))


@idiom
def layers_are_sorted_by_their_norm(m: Any) -> None:
    layers = [nn.Linear(3, width) for width in (2, 5, 3)]
    m.layers = nn.ModuleList(sorted(layers, key=lambda layer: layer.weight.norm()))
    m.largest = max((nn.Linear(2, 2) for _ in range(4)), key=lambda layer: float(layer.weight.abs().max().detach()))


@idiom
def the_largest_of_tensors_is_taken_with_max(m: Any) -> None:
    m.a = nn.Parameter(max(torch.rand(()), torch.rand(()), torch.rand(())))
    m.b = nn.Parameter(min([torch.rand(()) for _ in range(5)]))
    m.c = nn.Parameter(sum(torch.rand(3) for _ in range(4)))


@idiom
def a_failing_operation_is_caught_and_another_taken(m: Any) -> None:
    try:
        weight = torch.randn(3, 4) @ torch.randn(3, 4)
    except RuntimeError:
        weight = torch.randn(3, 4)
    m.weight = nn.Parameter(weight)
    with contextlib.suppress(RuntimeError):
        m.never = nn.Parameter(torch.linalg.cholesky(-torch.eye(3)))
    m.after = nn.Parameter(torch.randn(3))


@idiom
def a_failing_random_operation_is_caught(m: Any) -> None:
    with contextlib.suppress(RuntimeError):
        torch.multinomial(torch.tensor([-1.0, 2.0]), 1)
    with contextlib.suppress(RuntimeError):
        torch.bernoulli(torch.tensor([2.0, 0.5]))
    with contextlib.suppress(RuntimeError, ValueError):
        torch.normal(0.0, -1.0, (3,))
    with contextlib.suppress(RuntimeError):
        torch.randint(5, 3, (2,))
    with contextlib.suppress(RuntimeError):
        torch.empty(3).uniform_(2, 1)
    with contextlib.suppress(RuntimeError):
        torch.empty(3).normal_(0, -1)
    m.after = nn.Parameter(torch.randn(3))


@idiom
def a_failing_write_leaves_the_value_as_it_was(m: Any) -> None:
    m.weight = nn.Parameter(torch.randn(3, 4))
    for wrong in (torch.ones(7), torch.ones(3, 4, 5)):
        with torch.no_grad(), contextlib.suppress(RuntimeError):
            m.weight.copy_(wrong)
    with contextlib.suppress(RuntimeError):
        m.weight.add_(1)  # a leaf that requires grad
    with contextlib.suppress(IndexError, RuntimeError), torch.no_grad():
        m.weight[torch.tensor([9])] = 1.0
    with contextlib.suppress(RuntimeError), torch.no_grad():
        m.weight.expand(2, 3, 4).add_(1)


@idiom
def an_assertion_looks_at_a_value(m: Any) -> None:
    m.weight = nn.Parameter(torch.rand(3))
    assert (m.weight >= 0).all()
    assert torch.isfinite(m.weight).all().item()
    assert not m.weight.isnan().any()
    torch._assert(bool((m.weight < 1).all()), "rand is below 1")
    torch.testing.assert_close(m.weight.data, m.weight.data.clone())


@idiom
def a_value_chooses_from_a_dict_and_a_list(m: Any) -> None:
    index = torch.randint(0, 3, ())
    m.act = [nn.PReLU(), nn.PReLU(2), nn.PReLU(3)][index]
    m.named = {0: nn.Linear(1, 1), 1: nn.Linear(2, 2), 2: nn.Linear(3, 3)}[index.item()]
    m.depth = nn.ModuleList(nn.Linear(2, 2) for _ in range(torch.randint(1, 5, ())))


@idiom
def drop_path_rates_come_from_linspace(m: Any) -> None:
    rates = [x.item() for x in torch.linspace(0, 0.3, 5)]
    m.scales = nn.ParameterList(nn.Parameter(torch.full((2,), rate)) for rate in rates)


@idiom
def a_value_is_matched_with_where_and_clamp(m: Any) -> None:
    x = torch.randn(10)
    hold(m, a=torch.where(x > 0, x, -x), b=x.clamp(min=torch.zeros(10)), c=torch.where(x > 0)[0])


@idiom.each
def test_control_flow_is_exact(body: Body) -> None:
    assert_idiom_is_exact(body)
