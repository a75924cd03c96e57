"""On several ranks: gradients of every layout are clipped as torch clips those of a model that is whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from nucleate import Runtime
from nucleate.errors import NonFiniteGradientError
from nucleate.strategies.clip import clip_by_norm, clip_by_value
from tests.multi.device import ON_CPU, accelerator, device

INF = math.inf
ORDERS = (1.0, 2.0, 3.0, 0.5, INF, -INF, 0.0, -1.0)

runtime = Runtime(accelerator=accelerator(), strategy="fsdp")
runtime.launch()
rank, world_size = runtime.global_rank, runtime.world_size


class Small(nn.Module):
    """Has parameters with fewer rows than there are ranks, and one without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, 3))
        self.bias = nn.Parameter(torch.full((1,), 0.5))
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.inner = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.gain).sum(1) * self.temperature + self.bias


def data() -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator(device()).manual_seed(1))


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_equal_on_all_ranks(number: Tensor) -> bool:
    return runtime.all_gather(number.detach().clone()).unique().numel() == 1


def strategies_clip_as_torch_does() -> None:
    for name in ("fsdp", "ddp"):
        mine = Runtime(accelerator=accelerator(), strategy=name)
        for order in ORDERS:
            torch.manual_seed(0)
            reference = Small()
            reference(data()).square().mean().backward()
            expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.1, order)
            torch.manual_seed(0)
            with mine.init_module(empty_init=True):
                original = Small()
            model, optimizer = mine.setup(original, torch.optim.SGD(original.parameters(), lr=0.1))
            mine.backward(model(data()).square().mean())
            norm = mine.clip_gradients(model, optimizer, max_norm=0.1, norm_type=order)
            assert is_equal_on_all_ranks(norm)
            torch.testing.assert_close(norm, expected, msg=lambda m, o=order, n=name: f"{n}, order {o}: {m}")
            for ours, theirs in zip(original.parameters(), reference.parameters(), strict=True):
                torch.testing.assert_close(whole(ours.grad), theirs.grad)


def not_finite_on_one_rank_is_refused_on_all() -> None:
    mesh = init_device_mesh(device().type, (world_size,))
    for order in (2.0, INF, 1.0):
        for bad in (math.nan, INF):
            values = torch.ones(world_size, 3)
            values[-1, 0] = bad
            parameter = nn.Parameter(distribute_tensor(torch.zeros_like(values), mesh, [Shard(0)]))
            parameter.grad = distribute_tensor(values, mesh, [Shard(0)])
            with pytest.raises(NonFiniteGradientError):
                clip_by_norm([parameter], 1e-3, order)
            torch.testing.assert_close(whole(parameter.grad), values, equal_nan=True)


def partial(mesh: Any, own: Any, op: str = "sum") -> tuple[nn.Parameter, Tensor]:
    """Return a parameter with a partial gradient, and the gradient that it stands for."""
    summands = torch.randn(world_size, 3, 4, generator=torch.Generator(device()).manual_seed(2))
    parameter = nn.Parameter(distribute_tensor(torch.zeros(3, 4), mesh, [own]))
    parameter.grad = DTensor.from_local(summands[rank].clone(), mesh, [Partial(op)], run_check=False)
    return parameter, summands.sum(0) if op == "sum" else summands.mean(0)


def partial_gradients_are_summed_first() -> None:
    mesh = init_device_mesh(device().type, (world_size,))
    for own in (Replicate(), Shard(0), Shard(1)):
        for op in ("sum", "avg") if ON_CPU else ("sum",):
            parameter, gradient = partial(mesh, own, op)
            clip_by_value([parameter], 0.3)
            torch.testing.assert_close(whole(parameter.grad), gradient.clamp(-0.3, 0.3))
            assert parameter.grad.placements == (own,)
            for order in ORDERS:
                parameter, gradient = partial(mesh, own, op)
                reference = nn.Parameter(torch.zeros(3, 4))
                reference.grad = gradient
                expected = nn.utils.clip_grad_norm_([reference], 0.1, order)
                norm = clip_by_norm([parameter], 0.1, order)
                torch.testing.assert_close(norm, expected)
                assert is_equal_on_all_ranks(norm)
                torch.testing.assert_close(whole(parameter.grad), reference.grad)


def a_refused_norm_leaves_a_partial_gradient_as_it_was() -> None:
    mesh = init_device_mesh(device().type, (world_size,))
    parameter = nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Replicate()]))
    parameter.grad = held = DTensor.from_local(torch.tensor([INF, 1.0]), mesh, [Partial()], run_check=False)
    with pytest.raises(NonFiniteGradientError):
        clip_by_norm([parameter], 1.0)
    assert parameter.grad is held
    assert held.placements == (Partial(),)


def meshes_and_plain_gradients_mix() -> None:
    """Two equal meshes that are not one object (on rank 0 they are), another mesh, and a plain gradient."""
    first = init_device_mesh(device().type, (world_size,), mesh_dim_names=("shard",))
    second = init_device_mesh(device().type, (world_size,), mesh_dim_names=("shard",))
    other = init_device_mesh(device().type, (world_size,), mesh_dim_names=("model",))
    if rank == 0:
        second = first
    generator = torch.Generator(device()).manual_seed(3)
    values = [torch.randn(5, 2, generator=generator) for _ in range(5)]
    layouts = [(first, Shard(0)), (second, Shard(1)), (other, Shard(0)), (first, Replicate()), None]
    for order in ORDERS:
        ours, theirs = [], []
        for value, layout in zip(values, layouts, strict=True):
            theirs.append(nn.Parameter(torch.zeros(5, 2)))
            theirs[-1].grad = value.clone()
            mine = value.clone() if layout is None else distribute_tensor(value, layout[0], [layout[1]])
            ours.append(nn.Parameter(torch.zeros_like(mine)))
            ours[-1].grad = mine
        expected = nn.utils.clip_grad_norm_(theirs, 0.1, order)
        norm = clip_by_norm([*ours, ours[0]], 0.1, order)
        torch.testing.assert_close(norm, expected)
        assert is_equal_on_all_ranks(norm)
        for left, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(whole(left.grad), right.grad)


def two_axes() -> None:
    if world_size != 4:
        return
    mesh = init_device_mesh(device().type, (2, 2), mesh_dim_names=("outer", "inner"))
    value = torch.randn(3, 3, generator=torch.Generator(device()).manual_seed(4))
    placements = [(Shard(0), Shard(0)), (Shard(0), Shard(1)), (Replicate(), Shard(0)), (Shard(1), Replicate())]
    for order in ORDERS:
        for held in placements:
            parameter = nn.Parameter(distribute_tensor(torch.zeros(3, 3), mesh, held))
            parameter.grad = distribute_tensor(value, mesh, held)
            reference = nn.Parameter(torch.zeros(3, 3))
            reference.grad = value.clone()
            expected = nn.utils.clip_grad_norm_([reference], 0.1, order)
            torch.testing.assert_close(clip_by_norm([parameter], 0.1, order), expected)
            torch.testing.assert_close(whole(parameter.grad), reference.grad)


def sparse_gradients_under_ddp() -> None:
    if not ON_CPU:
        return
    for limit in ({"max_norm": 0.1}, {"clip_val": 0.05}):
        mine = Runtime(accelerator=accelerator(), strategy="ddp")
        torch.manual_seed(0)
        reference = nn.Embedding(6, 2)
        rows = torch.tensor([[1, 3, 3, 0], [3, 4, 4, 4]])
        torch.manual_seed(0)
        with mine.init_module():
            original = nn.Embedding(6, 2, sparse=True)
        model, optimizer = mine.setup(original, torch.optim.SGD(original.parameters(), lr=0.1))
        mine.backward(model(rows[rank]).square().sum())
        (reference(rows).square().sum() / 2).backward()
        norm = mine.clip_gradients(model, optimizer, **limit)
        if "max_norm" in limit:
            torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.1))
        else:
            nn.utils.clip_grad_value_(reference.parameters(), 0.05)
        torch.testing.assert_close(original.weight.grad.to_dense(), reference.weight.grad)
        optimizer.step()


strategies_clip_as_torch_does()
not_finite_on_one_rank_is_refused_on_all()
partial_gradients_are_summed_first()
a_refused_norm_leaves_a_partial_gradient_as_it_was()
meshes_and_plain_gradients_mix()
two_axes()
if world_size == 2:
    sparse_gradients_under_ddp()
print("gradients of every layout are clipped", flush=True)
