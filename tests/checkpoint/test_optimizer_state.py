"""Optimizer state goes by the names of the parameters, and is read without a step being taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nucleate.checkpoint import load, open_checkpoint, save
from nucleate.cluster import Communicator
from nucleate.errors import CheckpointError, CheckpointKeyError, UsageError
from tests.device import device

pytestmark = pytest.mark.usefixtures("factories_on_device")

Build = Callable[[Any], torch.optim.Optimizer]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> list[float]:
    generator = torch.Generator(device()).manual_seed(seed)
    losses = []
    for _ in range(steps):
        batch = torch.randn(4, 6, generator=generator)

        def closure(batch: Tensor = batch) -> float:
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            loss.backward()
            return loss.item()

        losses.append(float(optimizer.step(closure)))  # type: ignore[arg-type]
    return losses


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adamw": torch.optim.AdamW,
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
    "rprop": torch.optim.Rprop,
    "asgd": torch.optim.ASGD,
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=2, history_size=2),
}


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
def test_a_resumed_optimizer_goes_on_exactly(tmp_path: Path, solo: Communicator, build: Build, warm: bool) -> None:
    model = make()
    optimizer = build(model.parameters())
    train(model, optimizer, 4)
    save(tmp_path / "c", {"model": model, "optimizer": optimizer}, solo)
    expected = train(model, optimizer, 4, seed=1)

    other = make()
    resumed = build(other.parameters())
    if warm:
        train(other, resumed, 2, seed=2)
    load(tmp_path / "c", {"model": other, "optimizer": resumed}, solo)
    assert train(other, resumed, 4, seed=1) == expected
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_loading_into_a_fresh_optimizer_takes_no_step(tmp_path: Path, solo: Communicator) -> None:
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    save(tmp_path / "c", {"model": model, "optimizer": optimizer}, solo)
    resumed = torch.optim.AdamW(model.parameters())
    resumed.register_step_pre_hook(lambda *_: pytest.fail("stepped"))
    load(tmp_path / "c", {"model": model, "optimizer": resumed}, solo)
    assert all(parameter.grad is not None for parameter in model.parameters())  # gradients are left alone, too
    assert resumed.state[model[0].weight]["exp_avg"].shape == (5, 6)
    assert float(resumed.state[model[0].weight]["step"]) == 1.0


def test_keys_on_disk_are_made_of_names(tmp_path: Path, solo: Communicator) -> None:
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    save(tmp_path / "c", {"model": model, "optimizer": optimizer}, solo)
    assert "optimizer.state.model.0.weight.exp_avg" in open_checkpoint(tmp_path / "c").tensors


def test_parameters_may_come_in_another_order(tmp_path: Path, solo: Communicator) -> None:
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 3)
    save(tmp_path / "c", {"model": model, "optimizer": optimizer}, solo)
    other = make()
    reordered = torch.optim.AdamW(reversed(list(other.parameters())))
    load(tmp_path / "c", {"optimizer": reordered, "model": other}, solo)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[mine]["exp_avg"], reordered.state[theirs]["exp_avg"])


def test_several_groups_and_models_keep_their_options(tmp_path: Path, solo: Communicator) -> None:
    def build() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        first, second = make(), make()
        groups = [{"params": first.parameters(), "lr": 0.1}, {"params": second.parameters(), "weight_decay": 0.5}]
        return first, second, torch.optim.AdamW(groups, lr=0.2)

    first, second, optimizer = build()
    train(nn.Sequential(first, nn.Linear(3, 6), second), optimizer, 2)
    optimizer.param_groups[0]["lr"] = 0.7
    optimizer.param_groups[1]["note"] = "mine"
    save(tmp_path / "c", {"nets": {"a": first, "b": second}, "optimizer": optimizer}, solo)
    other_first, other_second, other = build()
    load(tmp_path / "c", {"nets": {"a": other_first, "b": other_second}, "optimizer": other}, solo)
    assert [group["lr"] for group in other.param_groups] == [0.7, 0.2]
    assert other.param_groups[1]["weight_decay"] == 0.5
    assert other.param_groups[1]["note"] == "mine"
    assert torch.equal(optimizer.state[second[0].weight]["exp_avg"], other.state[other_second[0].weight]["exp_avg"])


def test_a_tied_parameter_is_found_under_any_of_its_names(tmp_path: Path, solo: Communicator, make_tied: Any) -> None:
    model = make_tied()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(4)).sum().backward()
    optimizer.step()
    save(tmp_path / "c", {"model": model, "optimizer": optimizer}, solo)
    other = make_tied()
    resumed = torch.optim.AdamW(other.parameters())
    load(tmp_path / "c", {"model": other, "optimizer": resumed}, solo)
    assert torch.equal(resumed.state[other.head.weight]["exp_avg"], optimizer.state[model.head.weight]["exp_avg"])


def test_a_module_under_activation_checkpointing_keeps_its_names(tmp_path: Path, solo: Communicator) -> None:
    # torch strips this wrapper's prefix from the state dict, but not from `named_parameters`.
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, wrapped = make(), make()
    wrapped[0] = checkpoint_wrapper(wrapped[0])
    optimizer = torch.optim.AdamW(wrapped.parameters())
    train(wrapped, optimizer, 2)
    save(tmp_path / "c", {"model": wrapped, "optimizer": optimizer}, solo)
    resumed = torch.optim.AdamW(model.parameters())
    load(tmp_path / "c", {"model": model, "optimizer": resumed}, solo)
    assert train(model, resumed, 2, seed=1) == train(wrapped, optimizer, 2, seed=1)


def test_a_module_that_detaches_in_its_own_state_dict_keeps_its_names(tmp_path: Path, solo: Communicator) -> None:
    class Detaching(nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            destination[f"{prefix}weight"] = self.weight.detach().clone()
            destination[f"{prefix}bias"] = self.bias.detach().clone()

    model, other = Detaching(6, 2), Detaching(6, 2)
    optimizer, resumed = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(other.parameters())
    train(model, optimizer, 2)
    save(tmp_path / "c", {"model": model, "optimizer": optimizer}, solo)
    load(tmp_path / "c", {"model": other, "optimizer": resumed}, solo)
    assert train(other, resumed, 2, seed=1) == train(model, optimizer, 2, seed=1)


def test_state_in_a_wider_dtype_than_its_parameter_keeps_its_dtype(tmp_path: Path, solo: Communicator) -> None:
    class Master(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["master"] = parameter.detach().float() + 1e-6

    model = nn.Linear(2, 2).bfloat16()
    optimizer = Master(model.parameters())
    optimizer.step()
    save(tmp_path / "c", {"model": model, "optimizer": optimizer}, solo)
    resumed = Master(model.parameters())
    load(tmp_path / "c", {"model": model, "optimizer": resumed}, solo)
    master = resumed.state[model.weight]["master"]
    assert master.dtype == torch.float32
    assert torch.equal(master, optimizer.state[model.weight]["master"])


def test_an_optimizer_without_its_module_is_refused_by_both(tmp_path: Path, solo: Communicator) -> None:
    model, stranger = make(), nn.Linear(4, 4)
    optimizer = torch.optim.SGD([*model.parameters(), *stranger.parameters()], lr=0.1)
    with pytest.raises(UsageError, match=r"2 parameters of optimizer .*param_groups\[0\]\['params'\]\[4\] \(4, 4\)"):
        save(tmp_path / "c", {"model": model, "optimizer": optimizer}, solo)
    assert list(tmp_path.iterdir()) == []
    save(tmp_path / "c", {"model": model, "optimizer": torch.optim.SGD(model.parameters())}, solo)
    with pytest.raises(UsageError, match="put the module that has them into the same state"):
        load(tmp_path / "c", {"model": model, "optimizer": optimizer}, solo)


def test_other_parameters_in_a_group_are_missing_and_unexpected(tmp_path: Path, solo: Communicator) -> None:
    model = make()
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.1)
    model(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    save(tmp_path / "c", {"model": model, "optimizer": optimizer}, solo)
    other = torch.optim.AdamW(model[1].parameters(), lr=0.2)
    with pytest.raises(CheckpointKeyError) as error:
        load(tmp_path / "c", {"model": model, "optimizer": other}, solo)
    assert "2 missing in the checkpoint: optimizer.param_groups.0: model.1.weight" in str(error.value)
    assert "2 unexpected in the checkpoint: optimizer.param_groups.0: model.0.weight" in str(error.value)
    assert other.param_groups[0]["lr"] == 0.2
    assert not other.state

    with pytest.warns(UserWarning, match="left as they were"):
        rest = load(tmp_path / "c", {"model": model, "optimizer": other}, solo, strict=False)
    assert other.param_groups[0]["lr"] == 0.1
    assert "exp_avg" in rest["optimizer"]["state"]["model.0.weight"]


def test_what_the_checkpoint_lacks_keeps_its_state_when_not_strict(tmp_path: Path, solo: Communicator) -> None:
    model = make()
    save(tmp_path / "c", {"model": model, "optimizer": torch.optim.AdamW(model[0].parameters())}, solo)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 2)
    kept = optimizer.state[model[1].weight]["exp_avg"].clone()
    with pytest.warns(UserWarning, match=r"model\.1\.weight"):
        load(tmp_path / "c", {"model": model, "optimizer": optimizer}, solo, strict=False)
    assert torch.equal(optimizer.state[model[1].weight]["exp_avg"], kept)
    assert model[0].weight not in optimizer.state


def test_another_number_of_groups_is_refused(tmp_path: Path, solo: Communicator) -> None:
    model = make()
    save(tmp_path / "c", {"model": model, "optimizer": torch.optim.SGD(model.parameters())}, solo)
    split = torch.optim.SGD([{"params": layer.parameters()} for layer in model])
    with pytest.raises(CheckpointError, match="has 2 parameter groups here but 1 in the checkpoint"):
        load(tmp_path / "c", {"model": model, "optimizer": split}, solo)


def test_something_else_under_an_optimizers_name_is_refused(tmp_path: Path, solo: Communicator) -> None:
    model = make()
    save(tmp_path / "c", {"model": model, "optimizer": 3}, solo)
    with pytest.raises(CheckpointError, match="is an optimizer here but not in the checkpoint"):
        load(tmp_path / "c", {"model": model, "optimizer": torch.optim.SGD(model.parameters())}, solo)


def test_torch_still_singles_out_the_step_by_its_name() -> None:
    # `_fields` relies on it (torch/optim/optimizer.py, `_process_value_according_to_param_policy`).
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter])
    state = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
    optimizer.load_state_dict({"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]})
    assert optimizer.state[parameter]["step"].dtype == torch.float32
    assert optimizer.state[parameter]["exp_avg"].dtype == torch.bfloat16
