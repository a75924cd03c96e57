"""Deferred construction for a device with a generator of its own is eager construction on that device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nucleate.deferred import deferred, record_of
from nucleate.devices import default_generator
from nucleate.errors import DeferredUseError
from nucleate.materialize import Plan, materialize
from tests.deferred.equality import assert_same_model
from tests.zoo import ZOO

SIM = torch.device("sim", 0)
OTHER = torch.device("sim", 1)


class Everything(nn.Module):
    """Fills, a rejection loop, a decomposition, a permutation, constants, and tensors of the host beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        nn.init.trunc_normal_(self.lines[0].weight, std=0.5, a=-0.5, b=0.5)
        nn.init.orthogonal_(self.lines[1].weight)
        nn.init.normal_(self.lines[2].weight)  # which makes the first fill dead
        self.small = nn.Parameter(torch.randn(5, 7, dtype=torch.bfloat16))
        self.register_buffer("order", torch.randperm(9))
        self.register_buffer("constant", torch.tensor([1.0, 2.0]))
        self.register_buffer("host", torch.rand(4, device="cpu"))
        self.register_buffer("moved", torch.rand(4, device="cpu").to(self.small.device))
        self.tied = self.lines[0].weight


def both_states(device: torch.device) -> tuple[Tensor, Tensor]:
    return default_generator(device).get_state(), torch.get_rng_state()


def construct(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    with device, deferred(device):
        return make()


def apart() -> None:
    """Seed both generators and let the device's run ahead, so that one cannot stand in for the other."""
    torch.manual_seed(3)
    for device in (SIM, OTHER):
        torch.rand(5, device=device)


MAKES = {**{name: entry[0] for name, entry in ZOO.items()}, "every kind of step": Everything}


@pytest.mark.parametrize("device", [SIM, OTHER], ids=str)
@pytest.mark.parametrize("name", MAKES)
def test_models_and_both_generators_are_eagers(name: str, device: torch.device) -> None:
    make = MAKES[name]
    apart()
    with device:
        eager = make()
    expected = both_states(device)
    apart()
    untouched = both_states(OTHER if device == SIM else SIM)[0]
    model = construct(make, device)
    assert all(map(torch.equal, both_states(device), expected))
    materialize(model, device)
    assert all(map(torch.equal, both_states(device), expected))
    assert torch.equal(both_states(OTHER if device == SIM else SIM)[0], untouched)
    assert_same_model(eager, model)


def test_a_device_without_an_index_is_the_current_one() -> None:
    torch.accelerator.set_device_index(1)
    with torch.device("sim"), deferred("sim"):
        model = nn.Linear(2, 2)
    assert model.weight.device == OTHER
    materialize(model, "sim")
    assert model.weight.device == OTHER


def test_a_model_is_made_on_another_device_of_the_same_kind() -> None:
    apart()
    with SIM:
        eager = Everything()
    apart()
    model = construct(Everything, SIM)
    states = [both_states(device) for device in (SIM, OTHER)]
    materialize(model, OTHER)
    assert {t.device for t in model.parameters()} == {OTHER}
    for name, tensor in eager.state_dict().items():
        assert torch.equal(model.state_dict()[name].cpu(), tensor.cpu()), name
    for device, state in zip((SIM, OTHER), states, strict=True):
        assert all(map(torch.equal, both_states(device), state))


def test_the_fingerprint_of_a_construction_does_not_depend_on_the_index() -> None:
    digests = []
    for device in (SIM, OTHER):
        torch.manual_seed(3)
        digests.append(Plan.of(construct(Everything, device)).digest())
    assert digests[0] == digests[1]


def test_what_is_recorded_for_the_device_is_not_made_on_the_cpu() -> None:
    model = construct(Everything, SIM)
    with pytest.raises(DeferredUseError, match=r"lines\.0\.bias.* constructed for 'sim' and are wanted on 'cpu'"):
        materialize(model, "cpu")
    materialize(model, SIM)  # It is still as deferred as it was.


def test_what_is_recorded_for_the_cpu_is_made_there_and_moved() -> None:
    torch.manual_seed(3)
    eager = Everything()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    before = both_states(SIM)[0]
    with deferred():
        model = Everything()
    materialize(model, SIM)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(both_states(SIM)[0], before)
    # What the constructor made of values was never deferred.
    deferred_ones = {name: t for name, t in model.state_dict().items() if name not in ("constant", "host", "moved")}
    assert {t.device for t in deferred_ones.values()} == {SIM}
    for name, tensor in eager.state_dict().items():
        assert torch.equal(model.state_dict()[name].cpu(), tensor), name
    assert model.tied is model.lines[0].weight


def test_a_generator_of_the_users_own_and_a_state_that_the_constructor_keeps() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            own = torch.Generator("sim").manual_seed(5)
            self.drawn = nn.Parameter(torch.randn(6, generator=own, device="sim"))
            torch.rand(3)
            self.register_buffer("state", torch.sim.get_rng_state())
            self.again = nn.Parameter(torch.rand(3))
            torch.sim.set_rng_state(self.state)
            self.same = nn.Parameter(torch.rand(3))
            self.register_buffer("own_state", own.get_state())

    torch.manual_seed(1)
    with SIM:
        eager = Keeps()
    torch.manual_seed(1)
    model = construct(Keeps, SIM)
    assert torch.equal(model.get_buffer("state"), eager.get_buffer("state"))
    materialize(model, SIM)
    assert_same_model(eager, model)


def test_a_module_that_offers_only_the_states_of_its_generators_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nucleate.devices.table._generators", {})
    monkeypatch.delattr(torch.sim, "default_generators", raising=False)
    assert not isinstance(default_generator(OTHER), torch.Generator)
    for device in (SIM, OTHER):
        apart()
        with device:
            eager = Everything()
        expected = both_states(device)
        apart()
        model = construct(Everything, device)
        materialize(model, device)
        assert all(map(torch.equal, both_states(device), expected))
        assert_same_model(eager, model)


def test_a_recording_for_the_cpu_inside_one_for_the_device_keeps_its_tensors_to_itself() -> None:
    with SIM, deferred(SIM) as outer:
        with deferred("cpu") as inner:
            made = torch.ones(3, device="cpu")
            doubled = made * 2
        assert record_of(made) is record_of(doubled) is inner
        assert not outer.tape.steps
        model = nn.Linear(2, 2)
    assert record_of(model.weight) is outer


def test_the_constructor_may_change_the_current_device() -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.here = nn.Parameter(torch.rand(3))
            with torch.accelerator.device_index(1):
                self.there = nn.Parameter(torch.rand(3, device="sim"))

    apart()
    with SIM:
        eager = Changes()
    expected = [both_states(device) for device in (SIM, OTHER)]
    apart()
    model = construct(Changes, SIM)
    materialize(model, SIM)
    assert model.there.device == eager.there.device == OTHER
    assert_same_model(eager, model)
    for device, states in zip((SIM, OTHER), expected, strict=True):
        assert all(map(torch.equal, both_states(device), states))


def test_the_seed_that_a_constructor_asks_for_is_the_users() -> None:
    torch.manual_seed(5)
    with SIM, deferred(SIM):
        torch.rand(3)
        assert torch.sim.initial_seed() == torch.initial_seed() == 5


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "pow", "norm", "matmul"])
def test_autocast_casts_as_it_does_on_the_device(name: str) -> None:
    functions = {
        "softmax": lambda x: x.softmax(-1),
        "log_softmax": lambda x: nn.functional.log_softmax(x, -1),
        "pow": lambda x: x.pow(2),
        "norm": lambda x: torch.norm(x),
        "matmul": lambda x: x @ x.t(),
    }

    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.autocast("sim", dtype=torch.bfloat16):
                half = torch.randn(4, 4).to(torch.bfloat16)
                self.register_buffer("made", functions[name](half if name != "matmul" else half.float()))

    torch.manual_seed(5)
    with SIM:
        eager = Casts()
    torch.manual_seed(5)
    model = construct(Casts, SIM)
    materialize(model, SIM)
    assert_same_model(eager, model)
