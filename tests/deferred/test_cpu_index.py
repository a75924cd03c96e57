"""A CPU with an index, as Accelerate and Lightning name it, is the CPU."""

from __future__ import annotations

import torch
from torch import nn

from nucleate.deferred import deferred, handle_of
from nucleate.materialize import materialize
from tests.device import cpu_only

pytestmark = cpu_only("it is about the CPU's index")


class Indexed(nn.Module):
    """Tensors made on an indexed CPU and moved there. torch copies in such a move, so that edits stay apart."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, device="cpu:0"))
        self.copied = self.weight.detach().to("cpu:0")
        self.copied.zero_()
        self.other = self.weight.detach().to(torch.device("cpu", 1)).add_(1)
        self.double = torch.rand(3, device=torch.device("cpu", 0)).to("cpu:0", torch.float64)
        self.shared = self.weight.detach().to("cpu")[1:]
        self.shared[0] = 7


def made() -> Indexed:
    torch.manual_seed(0)
    return Indexed()


NAMES = ("weight", "copied", "other", "double", "shared")


def test_construction_with_an_index_is_deferred_and_exact() -> None:
    expected, stream = made(), torch.get_rng_state()
    with deferred():
        model = made()
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(handle_of(getattr(model, name)) is not None for name in NAMES)
    materialize(model)
    assert all(torch.equal(getattr(model, name), getattr(expected, name)) for name in NAMES)


def test_a_move_to_the_cpu_with_an_index_keeps_a_model_deferred() -> None:
    torch.manual_seed(0)
    expected = nn.Linear(4, 4)
    torch.manual_seed(0)
    with deferred():
        model = nn.Linear(4, 4)
    model.to("cpu:0").to(torch.device("cpu", 0))
    assert handle_of(model.weight) is not None
    assert torch.equal(materialize(model).weight, expected.weight)
