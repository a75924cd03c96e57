"""The strategy keeps the contract, and sends what it says. Runs in one process and under torchrun."""

import pytest
import torch

from nucleate import Runtime, Strategy
from nucleate.errors import ConfigurationError
from nucleate.testing import StrategySuite
from nucleate_example import CompressedStrategy


class TestCompressed(StrategySuite):
    # Two ranks round gradients to 8 significant bits before they are averaged.
    rtol = 2e-2

    def make_strategy(self) -> Strategy:
        return CompressedStrategy()


class TestUncompressed(StrategySuite):
    def make_strategy(self) -> Strategy:
        return CompressedStrategy(dtype=torch.float32)


def test_its_name_stands_for_it() -> None:
    assert isinstance(Runtime(accelerator="cpu", strategy="compressed").strategy, CompressedStrategy)


def test_gradients_are_the_mean_over_the_ranks_rounded() -> None:
    runtime = Runtime(accelerator="cpu", strategy="compressed")
    model = runtime.setup(torch.nn.Linear(1, 1, bias=False))
    scales = [1.001 * (rank + 1) for rank in range(runtime.world_size)]
    runtime.backward(model(torch.full((1, 1), scales[runtime.global_rank])).sum())
    mean = sum(scales) / len(scales)
    assert model.weight.grad is not None
    assert model.weight.grad.item() == pytest.approx(mean, rel=1e-2)
    assert (model.weight.grad.item() == pytest.approx(mean, rel=1e-6)) == (runtime.world_size == 1)


def test_a_dtype_that_cannot_hold_gradients_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"torch\.int8"):
        CompressedStrategy(dtype=torch.int8)
