"""The help that torch's optimizers need on DTensors lasts for one step; tests/multi/test_optimizers.py has values."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import _muon

from nucleate import Runtime
from nucleate.dimensions.sharding.sharded_step import sharded_step
from tests.device import ACCELERATOR

pytestmark = pytest.mark.usefixtures("factories_on_device")


def sharded(*others: nn.Parameter) -> list[nn.Parameter]:
    model = Runtime(accelerator=ACCELERATOR, strategy="fsdp").setup(nn.Linear(3, 2))
    return [*model.parameters(), *others]


def options(optimizer: torch.optim.Optimizer) -> list[tuple[Any, Any]]:
    return [(group.get("foreach"), group.get("fused")) for group in optimizer.param_groups]


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adagrad])
def test_shards_step_without_fused_kernels_that_do_not_take_them(cls: Any) -> None:
    optimizer = cls(sharded(), lr=0.1, fused=True)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    before = options(optimizer)

    def step() -> None:
        assert [fused for _, fused in options(optimizer)] == [None, True]
        # A gradient scaler must skip steps itself.
        assert not optimizer._step_supports_amp_scaling
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), sharded_step(optimizer):
        step()
    assert options(optimizer) == before
    assert optimizer._step_supports_amp_scaling


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
def test_shards_step_with_fused_kernels_that_take_them(cls: Any) -> None:
    optimizer = cls(sharded(nn.Parameter(torch.tensor(1.0))), lr=0.1, fused=True)
    with sharded_step(optimizer):
        assert options(optimizer) == [(None, True)]


@pytest.mark.parametrize("other", [torch.ones(3), torch.tensor(1 + 1j)], ids=["several elements", "complex"])
@pytest.mark.parametrize("given", [{"foreach": True}, {}], ids=["foreach", "default"])
def test_plain_parameters_that_do_not_mix_with_shards_step_one_by_one(other: torch.Tensor, given: Any) -> None:
    parameters = sharded(nn.Parameter(other))
    optimizer = torch.optim.Adam(parameters, lr=0.1, **given)
    expected = torch.optim.Adam([nn.Parameter(other.clone())], lr=0.1)
    for parameter in (*parameters, *expected.param_groups[0]["params"]):
        parameter.grad = torch.ones_like(parameter)
    before = options(optimizer)
    with sharded_step(optimizer):
        assert options(optimizer) == [(False, None if "fused" not in optimizer.param_groups[0] else False)]
        optimizer.step()
    assert options(optimizer) == before
    expected.step()
    torch.testing.assert_close(parameters[-1], expected.param_groups[0]["params"][0])


def test_plain_parameters_alone_step_as_always() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, fused=True)
    with sharded_step(optimizer):
        assert options(optimizer) == [(None, True)]


def test_muon_gathers_in_its_step_only_and_plain_matrices_are_left_alone() -> None:
    own = _muon._zeropower_via_newtonschulz
    matrix = nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.Muon([matrix])

    def step() -> None:
        assert _muon._zeropower_via_newtonschulz is not own
        coefficients = (3.4445, -4.7750, 2.0315)
        arguments = (matrix.detach(), coefficients, 5, 1e-7)
        assert torch.equal(_muon._zeropower_via_newtonschulz(*arguments), own(*arguments))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), sharded_step(optimizer):
        step()
    assert _muon._zeropower_via_newtonschulz is own
