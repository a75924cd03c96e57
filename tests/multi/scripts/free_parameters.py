"""Parameters of optimizers that no model has, under the strategy of the first argument; run by test_free_parameters.py.

A training of one process on the batches of all ranks gives the expected values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.cluster import Communicator
from nucleate.errors import RankDisagreementError, RankFailedError, UsageError
from tests.multi.checks import run_checks
from tests.multi.device import ON_CPU, accelerator, device, start_group

STRATEGY = sys.argv[1]
#: Makes an optimizer.
Make = Callable[[Any], torch.optim.Optimizer]
MAKERS: list[Make] = [
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.05, foreach=True),
]


def make(precision: str | None = None) -> Runtime:
    return Runtime(accelerator=accelerator(), strategy=STRATEGY, precision=precision)


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator(device()).manual_seed(100 * step + rank))


def loss_of(model: nn.Module, latents: Tensor, temperature: Tensor, x: Tensor) -> Tensor:
    return ((model(x) + latents.sum(0)) * temperature.exp()).square().mean()


def free(value: float) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.full((2, 4), value)), nn.Parameter(torch.tensor(value))


def plainly(make_optimizer: Make, world_size: int, num_steps: int, max_norm: float) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    latents, temperature = free(0.5)
    optimizer = make_optimizer([*model.parameters(), latents, temperature])
    for step in range(num_steps):
        optimizer.zero_grad()
        for rank in range(world_size):
            for part in range(2):
                loss = loss_of(model, latents, temperature, batch(2 * step + part, rank))
                (loss / world_size).backward()
        nn.utils.clip_grad_norm_([*model.parameters(), latents, temperature], max_norm)
        optimizer.step()
    return [latents.detach(), temperature.detach()]


def set_up(runtime: Runtime, make_optimizer: Make, value: float = 0.5) -> tuple[Any, Any, nn.Parameter, nn.Parameter]:
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        model = nn.Linear(3, 4)
    # Each rank begins with another value.
    latents, temperature = free(value + runtime.global_rank)
    optimizer = make_optimizer([*model.parameters(), latents, temperature])
    return *runtime.setup(model, optimizer), latents, temperature


def step_of(runtime: Runtime, model: Any, optimizer: Any, latents: Tensor, temperature: Tensor, step: int) -> None:
    for part in range(2):
        with runtime.no_backward_sync(model, enabled=part == 0):
            x = batch(2 * step + part, runtime.global_rank)
            runtime.backward(loss_of(model, latents, temperature, x))


def they_train_as_in_one_process(comm: Communicator, _: Path) -> None:
    for make_optimizer in MAKERS:
        runtime = make()
        model, optimizer, latents, temperature = set_up(runtime, make_optimizer)
        assert latents.eq(0.5).all(), "every rank has rank 0's value"
        for step in range(3):
            optimizer.zero_grad()
            step_of(runtime, model, optimizer, latents, temperature, step)
            runtime.clip_gradients(model, optimizer, max_norm=0.7)
            optimizer.step()
        expected = plainly(make_optimizer, comm.world_size, 3, 0.7)
        torch.testing.assert_close([latents.detach(), temperature.detach()], expected, rtol=1e-4, atol=1e-5)
        everywhere = comm.all_gather(latents.detach())
        assert all(torch.equal(everywhere[0], other) for other in everywhere)


def a_clipped_norm_counts_the_average_once_and_is_equal_on_all_ranks(comm: Communicator, _: Path) -> None:
    runtime = make()
    model = runtime.setup(nn.Linear(1, 1))
    weight = nn.Parameter(torch.zeros(2))
    optimizer = runtime.setup_optimizers(torch.optim.SGD([weight], lr=1.0))
    runtime.backward((weight * torch.tensor([3.0, 4.0]) * 2 * comm.rank).sum())
    norm = runtime.clip_gradients(model, optimizer, max_norm=1.0)
    mean = (comm.world_size - 1) / 2 * 2
    torch.testing.assert_close(norm, torch.tensor(5.0 * mean))
    optimizer.step()
    torch.testing.assert_close(weight.detach(), -torch.tensor([0.6, 0.8]))


def a_rank_without_a_gradient_counts_as_one_with_zeros(comm: Communicator, _: Path) -> None:
    runtime = make()
    used, unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(()))
    optimizer = runtime.setup_optimizers(torch.optim.SGD([used, unused], lr=1.0, weight_decay=0.5))
    if comm.rank == comm.world_size - 1:
        runtime.backward(used.sum())
    optimizer.step()
    torch.testing.assert_close(used.detach(), torch.full((3,), -1 / comm.world_size))
    assert unused.grad is None
    assert unused.item() == 1.0, "no rank has a gradient, so its optimizer skips it"


def a_closure_steps_with_the_average(comm: Communicator, _: Path) -> None:
    runtime = make()
    weight = nn.Parameter(torch.zeros(2))
    optimizer = runtime.setup_optimizers(torch.optim.SGD([weight], lr=1.0))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight * comm.rank).sum()
        runtime.backward(loss)
        return loss

    assert optimizer.step(closure).item() == 0
    torch.testing.assert_close(weight.detach(), torch.full((2,), -(comm.world_size - 1) / 2))


def every_dtype_and_a_sparse_gradient_are_averaged(comm: Communicator, _: Path) -> None:
    runtime = make()
    dtypes = [torch.float64, torch.bfloat16, torch.float16, torch.complex64]
    some = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in dtypes if ON_CPU or not dtype.is_complex]
    table = nn.Parameter(torch.zeros(4, 2))
    optimizer = runtime.setup_optimizers(torch.optim.SGD([*some, table], lr=1.0, foreach=False))
    loss = nn.functional.embedding(torch.tensor([comm.rank]), table, sparse=ON_CPU).sum()
    for parameter in some:
        loss = loss + (parameter * (comm.rank + 1)).sum().real.float()
    runtime.backward(loss)
    optimizer.step()
    mean = (comm.world_size + 1) / 2
    for parameter in some:
        assert parameter.detach().cpu().eq(-mean).all(), parameter
    rows = torch.zeros(4, 2)
    rows[: comm.world_size] = -1 / comm.world_size
    torch.testing.assert_close(table.detach(), rows)


def parameters_that_are_added_later_are_taken_too(comm: Communicator, _: Path) -> None:
    runtime = make()
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.full((2,), 1.0 + comm.rank))
    optimizer = runtime.setup_optimizers(torch.optim.SGD([first], lr=1.0))
    optimizer.add_param_group({"params": [second]})
    assert second.eq(1).all()
    runtime.backward((second * comm.rank).sum())
    optimizer.step()
    torch.testing.assert_close(second.detach(), torch.full((2,), 1 - (comm.world_size - 1) / 2))
    with pytest.raises(RankDisagreementError, match=r"float32 \(1,\) on rank 0 but torch.float32 \(2,\) on rank 1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(min(comm.rank + 1, 2)))]})
    assert len(optimizer.param_groups) == 2


def other_shapes_are_refused_on_every_rank(comm: Communicator, _: Path) -> None:
    runtime = make()
    wrong = nn.Parameter(torch.zeros(comm.rank + 1))
    with pytest.raises(RankDisagreementError, match=r"that no model has are torch.float32 \(1,\) on rank 0 but"):
        runtime.setup_optimizers(torch.optim.SGD([wrong], lr=1.0))
    with runtime.init_module(empty_init=True):
        model = nn.Linear(2, 2)
    with pytest.raises(RankDisagreementError, match=r"parameters that no model has is 'torch.float32 \(1,\)' on rank"):
        runtime.setup(model, torch.optim.SGD([*model.parameters(), wrong], lr=1.0))
    assert "deferred" in repr(model.weight)
    only = [nn.Parameter(torch.zeros(1))] if comm.rank == 0 else list(runtime.setup(nn.Linear(1, 1)).parameters())
    if comm.rank == 0:
        runtime.setup(nn.Linear(1, 1))
    with pytest.raises(RankDisagreementError, match="that no model has"):
        runtime.setup_optimizers(torch.optim.SGD(only, lr=1.0))


def a_refusal_on_one_rank_is_an_error_on_every_rank(comm: Communicator, _: Path) -> None:
    runtime = make()
    weight = nn.Parameter(torch.zeros(1, device="meta" if comm.rank == 1 else device()))
    with pytest.raises(UsageError if comm.rank == 1 else RankFailedError, match="without values"):
        runtime.setup_optimizers(torch.optim.SGD([weight], lr=1.0))


def an_overflow_on_one_rank_skips_the_step_on_every_rank(comm: Communicator, _: Path) -> None:
    runtime = make("16-mixed")
    model = runtime.setup(nn.Linear(1, 1))
    weight = nn.Parameter(torch.zeros(1))
    optimizer = runtime.setup_optimizers(torch.optim.SGD([weight], lr=1.0))
    overflows = float("inf") if comm.rank == 0 else 1.0
    moved = []
    for scale, clips in ((overflows, False), (1.0, False), (overflows, True), (1.0, True)):
        before = weight.item()
        optimizer.zero_grad()
        runtime.backward((weight * scale).sum())
        if clips:
            runtime.clip_gradients(model, optimizer, clip_val=10.0)
        optimizer.step()
        moved.append(weight.item() - before)
    assert moved == [0.0, -1.0, 0.0, -1.0]


def they_are_saved_with_their_optimizer(comm: Communicator, folder: Path) -> None:
    for number, name in enumerate(("folder", "file.pt")):
        path = folder / f"{number}" / name
        runtime = make()
        model, optimizer, latents, temperature = set_up(runtime, MAKERS[1])
        step_of(runtime, model, optimizer, latents, temperature, 0)
        optimizer.step()
        runtime.save(path, {"model": model, "optimizer": optimizer})
        kept = latents.detach().clone(), temperature.detach().clone()
        optimizer.zero_grad()
        step_of(runtime, model, optimizer, latents, temperature, 1)
        optimizer.step()
        expected = latents.detach().clone(), temperature.detach().clone()
        assert not torch.equal(kept[0], expected[0])

        model, optimizer, latents, temperature = set_up(runtime, MAKERS[1], value=7.0)
        report = runtime.load(path, {"model": model, "optimizer": optimizer})
        assert "optimizer.free_parameters.1" in [found.key for found in report.loaded]
        assert torch.equal(latents, kept[0])
        assert torch.equal(temperature, kept[1])
        step_of(runtime, model, optimizer, latents, temperature, 1)
        optimizer.step()
        torch.testing.assert_close([latents.detach(), temperature.detach()], list(expected))


CHECKS = [
    they_train_as_in_one_process,
    a_clipped_norm_counts_the_average_once_and_is_equal_on_all_ranks,
    a_rank_without_a_gradient_counts_as_one_with_zeros,
    a_closure_steps_with_the_average,
    every_dtype_and_a_sparse_gradient_are_averaged,
    parameters_that_are_added_later_are_taken_too,
    other_shapes_are_refused_on_every_rank,
    a_refusal_on_one_rank_is_an_error_on_every_rank,
    an_overflow_on_one_rank_skips_the_step_on_every_rank,
    they_are_saved_with_their_optimizer,
]

if __name__ == "__main__":
    run_checks(CHECKS, start_group(), Path(sys.argv[2]))
