"""Gradient accumulation: which micro-batch makes the step, by what losses are divided, and what waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from nucleate import Runtime
from nucleate.errors import ConfigurationError, UsageError
from nucleate.precision import MixedPrecision
from tests.device import accelerator, device


def start(precision: str | None = None, lr: float = 0.1) -> tuple[Runtime, Any, Any]:
    chosen: Any = precision
    if precision == "16-mixed":
        # Nothing overflows with this scale: a step that is skipped is another matter.
        chosen = MixedPrecision(torch.float16, scaler=torch.amp.GradScaler(device().type, init_scale=256.0))
    runtime = Runtime(accelerator=accelerator(), precision=chosen)
    torch.manual_seed(0)
    with runtime.init_module():
        model = nn.Linear(3, 1)
    return runtime, *runtime.setup(model, torch.optim.SGD(model.parameters(), lr=lr))


def data(size: int = 16) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(1)).to(device())
    return x, x.sum(1, keepdim=True)


def loss_of(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def step_at_once(
    model: Any, optimizer: Any, runtime: Runtime, batches: list[tuple[Tensor, Tensor]], **clip: Any
) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        runtime.backward(loss_of(model, x, y))
        if clip:
            runtime.clip_gradients(model, optimizer, **clip)
        optimizer.step()


def assert_equal(model: Any, other: Any) -> None:
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("clears_first", [True, False])
@pytest.mark.parametrize("precision", [None, "16-mixed"])
@pytest.mark.parametrize("clip", [{}, {"max_norm": 0.1}, {"clip_val": 0.1}])
def test_micro_batches_make_the_step_of_one_large_batch(
    clears_first: bool, precision: str | None, clip: dict[str, float]
) -> None:
    x, y = data()
    runtime, model, optimizer = start(precision)
    lasts = []
    for xs, ys in zip(x.split(2), y.split(2), strict=True):
        with runtime.accumulate(model, every=4) as is_last:
            lasts.append(is_last)
            if clears_first:
                optimizer.zero_grad()
            runtime.backward(loss_of(model, xs, ys))
            if clip:
                norm = runtime.clip_gradients(model, optimizer, **clip)
                assert (norm is not None) == (is_last and "max_norm" in clip)
            optimizer.step()
            if not clears_first:
                optimizer.zero_grad()
    assert lasts == [False, False, False, True] * 2
    reference = start(precision)
    step_at_once(*reference[1:], reference[0], list(zip(x.split(8), y.split(8), strict=True)), **clip)
    assert_equal(model, reference[1])


def loader_of(size: int, runtime: Runtime, batch_size: int = 2) -> Any:
    return runtime.setup_dataloaders(DataLoader(TensorDataset(*(t.cpu() for t in data(size))), batch_size=batch_size))


def test_the_last_batches_of_an_epoch_make_a_step_of_their_own_average() -> None:
    runtime, model, optimizer = start()
    lasts = []
    for _ in range(2):
        for x, y in loader_of(12, runtime):
            with runtime.accumulate(model, every=4) as is_last:
                lasts.append(is_last)
                optimizer.zero_grad()
                runtime.backward(loss_of(model, x, y))
                optimizer.step()
    assert lasts == [False, False, False, True, False, True] * 2
    other, expected, sgd = start()
    x, y = data(12)
    step_at_once(expected, sgd, other, [(x[:8], y[:8]), (x[8:], y[8:])] * 2)
    assert_equal(model, expected)


def test_a_validation_loop_in_between_does_not_end_the_epoch_of_the_training() -> None:
    runtime, model, _ = start()
    validation = loader_of(4, runtime)
    lasts = []
    for number, _ in enumerate(loader_of(16, runtime)):
        with runtime.accumulate(model, every=4) as is_last:
            lasts.append(is_last)
        if number % 2:
            list(validation)
        else:
            next(iter(validation))  # Left early.
    assert lasts == [False, False, False, True] * 2


def test_of_two_loaders_in_step_the_shorter_one_ends_the_epoch() -> None:
    runtime, model, _ = start()
    lasts = []
    for _ in zip(loader_of(6, runtime), loader_of(20, runtime), strict=False):
        with runtime.accumulate(model, every=2) as is_last:
            lasts.append(is_last)
    assert lasts == [False, True, True]


def test_a_loader_that_is_left_early_goes_on_with_the_same_count() -> None:
    runtime, model, _ = start()
    loader, lasts = loader_of(16, runtime), []
    for _ in range(2):
        for number, _ in enumerate(loader):
            if number == 3:
                break
            with runtime.accumulate(model, every=4) as is_last:
                lasts.append(is_last)
    assert lasts == [False, False, False, True, False, False]


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(6.0))


def test_a_stream_ends_where_the_flag_says() -> None:
    runtime, model, optimizer = start()
    x, y = data(6)
    lasts = []
    for number, _ in enumerate(runtime.setup_dataloaders(DataLoader(Stream(), batch_size=1))):
        with runtime.accumulate(model, every=4, last=number == 5 or None) as is_last:
            lasts.append(is_last)
            runtime.backward(loss_of(model, x[number : number + 1], y[number : number + 1]))
            runtime.clip_gradients(model, optimizer, max_norm=100.0)
            optimizer.step()
            optimizer.zero_grad()
    assert lasts == [False, False, False, True, False, True]
    other, expected, sgd = start()
    step_at_once(expected, sgd, other, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert_equal(model, expected)


def test_a_batch_that_is_split_counts_by_its_parts() -> None:
    runtime, model, _ = start()
    lasts = []
    for x, _ in loader_of(16, runtime, batch_size=8):
        for _ in x.split(2):
            with runtime.accumulate(model, every=4, last=False) as is_last:
                lasts.append(is_last)
    assert lasts == [False, False, False, True] * 2


def test_parts_of_a_batch_without_the_flag_are_refused_at_once() -> None:
    runtime, model, _ = start()
    x, _ = next(iterator := iter(loader_of(16, runtime, batch_size=8)))
    first, second, *_ = x.split(2)
    with runtime.accumulate(model, every=4):
        runtime.backward(model(first).sum())
    with pytest.raises(UsageError, match="last=False"):
        with runtime.accumulate(model, every=4):
            pass
    with runtime.accumulate(model, every=4, last=False):
        runtime.backward(model(second).sum())
    iterator.close()


def test_models_that_train_in_turns_are_counted_apart() -> None:
    runtime, first, first_optimizer = start()
    second = runtime.setup(nn.Linear(3, 1).to(device()))
    second_optimizer = runtime.setup_optimizers(torch.optim.SGD(second.parameters(), lr=0.1))
    x, y = data(2)
    before = [parameter.clone() for parameter in (*first.parameters(), *second.parameters())]
    for _ in range(2):
        with runtime.accumulate(first, every=4):
            runtime.backward(loss_of(first, x, y))
            first_optimizer.step()
        with runtime.accumulate(second, every=2):
            runtime.backward(loss_of(second, x, y))
            first_optimizer.zero_grad()  # Not of this block, so it acts.
            second_optimizer.step()
    moved = [
        not torch.equal(old, new) for old, new in zip(before, (*first.parameters(), *second.parameters()), strict=True)
    ]
    assert moved == [False, False, True, True]


def test_models_that_train_together_share_a_count() -> None:
    runtime, first, _ = start()
    second = runtime.setup(nn.Linear(3, 1).to(device()))
    both = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    optimizer = runtime.setup_optimizers(both)
    x, _ = data(4)
    lasts = []
    for part in x.split(1):
        with runtime.accumulate(first, second, every=2) as is_last:
            lasts.append(is_last)
            runtime.backward((first(part) + second(part)).sum())
            optimizer.step()
    assert lasts == [False, True] * 2
    with pytest.raises(UsageError, match="counted some of these models apart"):
        with runtime.accumulate(first, every=2):
            pass


def test_a_micro_batch_that_fails_is_not_counted() -> None:
    runtime, model, _ = start()
    lasts = []
    for number in range(6):
        try:
            with runtime.accumulate(model, every=2) as is_last:
                if number in (1, 3):
                    raise MemoryError
                lasts.append(is_last)
        except MemoryError:
            pass
    assert lasts == [False, True, False, True]


def test_a_scheduler_steps_with_the_optimizer() -> None:
    runtime, model, optimizer = start(lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    x, y = data(8)
    for xs, ys in zip(x.split(2), y.split(2), strict=True):
        with runtime.accumulate(model, every=2) as is_last:
            runtime.backward(loss_of(model, xs, ys))
            optimizer.step()
            if is_last:
                scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_wrong_arguments_are_refused_before_anything_is_counted() -> None:
    runtime, model, optimizer = start()
    for every in (0, -1, True, 2.0, None):
        with pytest.raises(ConfigurationError, match="every"):
            with runtime.accumulate(model, every=every):  # type: ignore[arg-type]
                pass
    for wrong in (nn.Linear(1, 1), 3):
        with pytest.raises(UsageError, match="accumulate takes the model that `setup` returned"):
            with runtime.accumulate(wrong, every=2):  # type: ignore[arg-type]
                pass
    with pytest.raises(UsageError, match="without a model"):
        with runtime.accumulate(every=2):
            pass
    with runtime.accumulate(model, every=2) as is_last:
        assert not is_last
        with pytest.raises(UsageError, match="inside another"):
            with runtime.accumulate(model, every=2):
                pass
        with pytest.raises(UsageError, match="closure"):
            optimizer.step(lambda: None)
    with runtime.accumulate(model, every=2) as is_last:
        assert is_last


def test_a_limit_that_is_refused_leaves_scaled_gradients_as_they_are() -> None:
    runtime, model, optimizer = start("16-mixed")
    runtime.backward(loss_of(model, *data(4)))
    before = [parameter.grad.clone() for parameter in model.parameters()]
    for wrong in ({"max_norm": -1.0}, {"clip_val": float("nan")}, {"max_norm": 1.0, "norm_type": float("nan")}):
        with pytest.raises(ConfigurationError, match="must be a number"):
            runtime.clip_gradients(model, optimizer, **wrong)
    assert all(torch.equal(old, p.grad) for old, p in zip(before, model.parameters(), strict=True))
