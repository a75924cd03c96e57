"""The precision keeps the contract, rounds without bias, and learns where plain bfloat16 stands still."""

import pytest
import torch

from nucleate import Precision, Runtime
from nucleate.errors import ConfigurationError
from nucleate.testing import PrecisionSuite
from nucleate_example import StochasticPrecision
from nucleate_example.stochastic import round_stochastically


class TestStochastic(PrecisionSuite):
    def make_precision(self) -> Precision:
        return StochasticPrecision()


def test_its_name_stands_for_it() -> None:
    assert isinstance(Runtime(accelerator="cpu", precision="bf16-stochastic").precision, StochasticPrecision)


def test_rounding_is_right_on_average_and_goes_to_a_neighbour() -> None:
    value = 1.0 + 2**-9  # a quarter of the way from 1 to the next bfloat16
    rounded = round_stochastically(torch.full((100_000,), value), torch.Generator().manual_seed(0)).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert rounded.mean().item() == pytest.approx(value, abs=2e-4)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, float("inf"), float("-inf")])
def test_what_bfloat16_can_hold_is_kept(value: float) -> None:
    rounded = round_stochastically(torch.full((100,), value), torch.Generator().manual_seed(0))
    assert set(rounded.tolist()) == {value}


@pytest.mark.parametrize(("precision", "learns"), [("bf16-true", False), ("bf16-stochastic", True)])
def test_updates_below_the_rounding_of_bfloat16_are_not_lost(precision: str, learns: bool) -> None:
    runtime = Runtime(accelerator="cpu", precision=precision)
    parameter = torch.nn.Linear(100, 1, bias=False)
    torch.nn.init.ones_(parameter.weight)
    model, optimizer = runtime.setup(parameter, torch.optim.SGD(parameter.parameters(), lr=1e-4))
    for _ in range(100):
        optimizer.zero_grad()
        runtime.backward(model(torch.ones(1, 100)).sum())
        optimizer.step()
    # 100 steps of 1e-4 each.
    assert model.weight.float().mean().item() == pytest.approx(0.99 if learns else 1.0, abs=2e-3)


def test_the_step_uses_no_global_randomness_and_is_repeatable() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        runtime = Runtime(accelerator="cpu", precision="bf16-stochastic")
        model = torch.nn.Linear(8, 8)
        model, optimizer = runtime.setup(model, torch.optim.AdamW(model.parameters()))
        before = torch.get_rng_state()
        runtime.backward(model(torch.ones(1, 8)).sum())
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), before)
        results.append(model.weight.detach().clone())
    assert torch.equal(*results)


def test_a_strategy_that_shards_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'bf16-stochastic' does not work with strategy 'fsdp'"):
        Runtime(accelerator="cpu", strategy="fsdp", precision="bf16-stochastic")
