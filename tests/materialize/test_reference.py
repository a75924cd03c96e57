"""The reference makes what eager construction makes, without a jump, and the stream stays where it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nucleate.deferred import deferred
from nucleate.deferred.randomness import mersenne_twister
from nucleate.deferred.replay.replayer import view
from nucleate.materialize import Plan
from nucleate.materialize.reference import Reference
from tests.device import cpu_only, device
from tests.zoo import ZOO

pytestmark = pytest.mark.usefixtures("factories_on_device")


class Reseeded(nn.Module):
    """A seed in the middle, a state taken back, a generator of one's own, rejection loops and few numbers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator(device()).manual_seed(5)
        self.first = nn.Parameter(torch.randn(700, 700))
        self.own = nn.Parameter(torch.rand(9, 9, generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.forked = nn.Parameter(torch.randn(33))
        self.few = nn.Parameter(torch.randn(7))
        self.rejected = nn.Parameter(nn.init.trunc_normal_(torch.empty(9, 50), a=-0.1, b=0.1))
        self.again = nn.Parameter(nn.init.trunc_normal_(torch.empty(9, 50), a=-0.2, b=0.1))
        self.last = nn.Parameter(torch.rand(5) + torch.randn(5, generator=generator))


def no_jump(*args: object) -> torch.Tensor:
    raise AssertionError("the reference has jumped")


@pytest.mark.parametrize("name", [*ZOO, "reseeded"])
@pytest.mark.parametrize("backward", [False, True])
def test_it_makes_what_eager_makes_in_any_order(name: str, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Reseeded if name == "reseeded" else ZOO[name][0]
    torch.manual_seed(0)
    eager = make()
    torch.manual_seed(0)
    with deferred(device()):
        model = make()
    expected = {**dict(eager.named_parameters()), **dict(eager.named_buffers())}
    plan = Plan.of(model)
    reference = Reference()
    before = torch.get_rng_state()
    monkeypatch.setattr(mersenne_twister, "jump", no_jump)
    for group in plan.groups[:: -1 if backward else 1]:
        storage = reference.make(group.source, device())
        for target in group.targets:
            if target.holders[0].kind != "attribute":
                # What no device drew or computed is made on the CPU.
                assert torch.equal(view(storage, target.ref).cpu(), expected[target.fqn].cpu()), target.fqn
    assert torch.equal(before, torch.get_rng_state())


@cpu_only("a device with a generator of its own makes a tensor whole, not in ranges")
def test_a_range_is_made_from_the_place_that_drawing_leads_to(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(900, 900), nn.Embedding(40, 40))
    torch.manual_seed(0)
    with deferred(device()):
        model = nn.Sequential(nn.Linear(900, 900), nn.Embedding(40, 40))
    monkeypatch.setattr(mersenne_twister, "jump", no_jump)
    group = next(group for group in Plan.of(model).groups if group.targets[0].fqn == "1.weight")
    found = Reference().maker(group.source)
    assert found is not None
    maker, cursors = found
    out = torch.empty(700)
    maker.make(35, out, cursors)
    assert torch.equal(out, eager[1].weight.view(-1)[35:735])
    assert Reference().maker(Plan.of(_orthogonal()).groups[0].source) is None


def _orthogonal() -> nn.Module:
    with deferred(device()):
        layer = nn.Linear(4, 4, bias=False)
        nn.init.orthogonal_(layer.weight)
    return layer
