from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nucleate import Runtime
from nucleate.errors import UsageError
from nucleate.report import anonymous_bytes, measure_flops


class Net(nn.Module):
    """Has a tie, a table, statistics and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.block(self.embedding(x)) + self.table
        return self.head(self.norm(hidden.transpose(1, 2)).transpose(1, 2))


X, Y = torch.randint(10, (2, 5)), torch.randint(10, (10,))


def loss_of(output: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), Y)


@pytest.mark.parametrize("deferred", [True, False])
def test_the_count_is_torchs_and_the_model_stays_as_it_is(deferred: bool) -> None:
    torch.manual_seed(0)
    expected = Net()
    with FlopCounterMode(display=False) as forward:
        expected(X)
    with FlopCounterMode(display=False) as both:
        loss_of(expected(X)).backward()
    torch.manual_seed(0)
    runtime = Runtime(accelerator="cpu")
    with runtime.init_module(empty_init=deferred):
        model = Net()
    parameters, random = list(model.parameters()), torch.get_rng_state()
    assert measure_flops(model, lambda: model(X)) == forward.get_total_flops()
    assert measure_flops(model, lambda: model(X), loss_of) == both.get_total_flops()
    assert all(mine is before for mine, before in zip(model.parameters(), parameters, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    torch.manual_seed(0)
    fresh = Net()
    runtime.setup(model)
    for (name, mine), theirs in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_counting_a_large_deferred_model_allocates_nothing() -> None:
    runtime = Runtime(accelerator="cpu")
    with runtime.init_module(empty_init=True):
        model = nn.Sequential(*(nn.Linear(8192, 8192, bias=False) for _ in range(4)))
    before = anonymous_bytes()
    x = torch.empty(1, 8192)
    assert measure_flops(model, lambda: model(x), lambda output: output.sum()) == 2 * 8192**2 * (4 * 3 - 1)
    after = anonymous_bytes()
    assert before is None or after is None or after - before < 64 * 2**20


def test_a_model_that_was_set_up_is_refused() -> None:
    model = Runtime(accelerator="cpu").setup(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="before `setup`"):
        measure_flops(model, lambda: model(torch.ones(1, 2)))


def test_a_forward_that_needs_values_is_an_error_and_leaves_the_model() -> None:
    model = nn.Linear(2, 2)
    weight = model.weight
    with pytest.raises(UsageError, match="needs the value"):
        measure_flops(model, lambda: model(torch.ones(1, 2)).sum().item())
    assert model.weight is weight
