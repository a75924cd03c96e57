"""Parameters of optimizers that no model has, in one process; tests/multi has the averages over several."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.cluster import Communicator, Environment
from nucleate.errors import CheckpointKeyError, ConfigurationError, UsageError
from nucleate.wrappers.free_parameters import FreeParameters
from tests.device import ACCELERATOR, device

pytestmark = pytest.mark.usefixtures("factories_on_device")


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(accelerator=ACCELERATOR)


def find(*parameters: Any, known: Any = (), world_size: int = 1) -> list[Tensor]:
    environment = Environment(world_size=world_size, local_world_size=world_size)
    free = FreeParameters(Communicator(environment, device()))
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    return free.find(optimizer, parameters, {id(p) for p in known})


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_parameters_that_no_model_has_are_found_once(world_size: int) -> None:
    free, known = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(1))
    assert find(known, known=[known], world_size=world_size) == []
    (found,) = find(free, known, free, known=[known], world_size=world_size)
    assert found is free


def test_a_parameter_without_a_value_is_refused_by_name(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match=r"without values: a parameter of shape \(2,\)"):
        find(nn.Parameter(torch.ones(2, device="meta")))
    with runtime.init_module(empty_init=True):
        model = nn.Linear(2, 2)
        temperature = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([temperature], lr=0.1)
    with pytest.raises(ConfigurationError, match="1 parameters that Linear does not have"):
        runtime.setup(model, optimizer)
    with pytest.raises(UsageError, match=r"without values.*outside of `init_module`"):
        runtime.setup_optimizers(optimizer)


def test_a_parameter_on_another_device_is_refused() -> None:
    class Elsewhere(nn.Parameter):
        device = torch.device("cuda:7")  # type: ignore[assignment]

    with pytest.raises(UsageError, match=r"a parameter of shape \(2,\) on cuda:7.*device=runtime.device"):
        find(Elsewhere(torch.ones(2)))


def test_an_optimizer_of_another_instance_of_the_model_is_refused(runtime: Runtime) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match="2 parameters that Linear does not have"):
        runtime.setup(model, torch.optim.SGD(other.parameters(), lr=0.1))


@pytest.mark.parametrize("strategy", ["single_device", "ddp", "fsdp"])
def test_a_temperature_trains_beside_a_model_and_alone(strategy: str) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy=strategy)
    with runtime.init_module(empty_init=True):
        model = nn.Linear(2, 2)
    first, second = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(2))
    wrapped, both, alone = runtime.setup(
        model,
        torch.optim.AdamW([*model.parameters(), first], lr=0.1),
        torch.optim.SGD([second], lr=1.0),
    )
    assert both.free_parameters == [first]
    assert alone.free_parameters[0] is second
    runtime.backward((wrapped(torch.ones(1, 2)) * first.exp() + second).sum())
    assert runtime.clip_gradients(wrapped, alone, max_norm=1e-3) is not None
    both.step()
    alone.step()
    assert first.item() != 0
    torch.testing.assert_close(second.detach().norm(), torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_a_copy_of_an_optimizer_has_copies_of_the_free_parameters(runtime: Runtime) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = runtime.setup_optimizers(torch.optim.SGD([weight], lr=1.0))
    clone = copy.deepcopy(optimizer)
    assert clone.free_parameters[0] is clone.param_groups[0]["params"][0]
    assert clone.free_parameters[0] is not weight
    assert copy.copy(optimizer).free_parameters[0] is weight


@pytest.mark.parametrize("name", ["folder", "file.pt"])
def test_they_are_saved_and_loaded_with_their_optimizer(runtime: Runtime, tmp_path: Path, name: str) -> None:
    def made(value: float) -> tuple[Any, Any, nn.Parameter]:
        weight = nn.Parameter(torch.full((2,), value))
        model = nn.Linear(2, 2)
        wrapped, optimizer = runtime.setup(model, torch.optim.AdamW([*model.parameters(), weight], lr=0.1))
        return wrapped, optimizer, weight

    model, optimizer, weight = made(1.0)
    weight.grad = torch.ones(2)
    optimizer.step()
    path = tmp_path / name
    runtime.save(path, {"model": model, "optimizer": optimizer})
    runtime.save(tmp_path / "alone.pt", {"optimizer": runtime.setup_optimizers(torch.optim.SGD([weight], lr=1.0))})
    expected, moment = weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()

    model, optimizer, weight = made(5.0)
    report = runtime.load(path, {"model": model, "optimizer": optimizer})
    assert {"optimizer.free_parameters.0"} < {found.key for found in report.loaded}
    assert torch.equal(weight, expected)
    assert torch.equal(optimizer.state[weight]["exp_avg"], moment)

    other = nn.Parameter(torch.zeros(2))
    runtime.load(tmp_path / "alone.pt", {"optimizer": runtime.setup_optimizers(torch.optim.SGD([other], lr=1.0))})
    assert torch.equal(other, expected)
    whole = torch.load(tmp_path / "alone.pt", weights_only=True) if name == "file.pt" else {}
    assert not whole or torch.equal(whole["optimizer"]["free_parameters"]["0"].cpu(), expected.cpu())


def test_a_checkpoint_with_another_number_of_them_is_refused_before_anything_changes(
    runtime: Runtime, tmp_path: Path
) -> None:
    def made(count: int) -> tuple[Any, list[nn.Parameter]]:
        some = [nn.Parameter(torch.full((2,), float(count))) for _ in range(count)]
        return runtime.setup_optimizers(torch.optim.SGD(some, lr=1.0)), some

    runtime.save(tmp_path / "two", {"optimizer": made(2)[0]})
    for count, what in ((1, "unexpected"), (3, "missing")):
        optimizer, some = made(count)
        with pytest.raises(CheckpointKeyError, match=rf"{what} in the checkpoint: .*optimizer.free_parameters"):
            runtime.load(tmp_path / "two", {"optimizer": optimizer})
        assert some[0].eq(count).all()


def test_a_parameter_of_a_model_is_not_saved_with_the_optimizer_alone(runtime: Runtime, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    _, optimizer = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UsageError, match="belong to no module in the state"):
        runtime.save(tmp_path / "alone", {"optimizer": optimizer})
