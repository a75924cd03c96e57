"""What is saved comes back, bit for bit, and what was not asked for is handed over."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from nucleate.checkpoint import load, open_checkpoint, save
from nucleate.cluster import Communicator
from tests.checkpoint.trees import same, trees
from tests.device import equal

pytestmark = pytest.mark.usefixtures("factories_on_device")


class Counter:
    """An object with a state of its own."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = dict(state)


def same_bits(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def test_a_module_comes_back_in_place(tmp_path: Path, solo: Communicator, make_tied: Any) -> None:
    model, other = make_tied(), make_tied()
    model(torch.arange(8))  # moves the running statistics
    save(tmp_path / "c", {"model": model}, solo)
    weight = other.embed.weight
    assert load(tmp_path / "c", {"model": other}, solo) == {}
    assert same_bits(model, other)
    assert other.embed.weight is weight
    assert other.head.weight is weight
    assert weight.requires_grad


def test_a_tied_parameter_is_on_disk_once(tmp_path: Path, solo: Communicator, make_tied: Any) -> None:
    save(tmp_path / "c", {"model": make_tied()}, solo)
    contents = open_checkpoint(tmp_path / "c")
    assert "model.embed.weight" in contents.tensors
    assert "model.head.weight" not in contents.tensors
    assert contents.keys["model", "head.weight"] == "model.embed.weight"


def test_a_tied_checkpoint_fills_both_parameters_of_an_untied_model(
    tmp_path: Path, solo: Communicator, make_tied: Any
) -> None:
    model, untied = make_tied(), make_tied()
    untied.head.weight = nn.Parameter(torch.zeros_like(untied.head.weight))
    save(tmp_path / "c", {"model": model}, solo)
    load(tmp_path / "c", {"model": untied}, solo)
    assert torch.equal(untied.head.weight, model.embed.weight)
    assert torch.equal(untied.embed.weight, model.embed.weight)
    assert untied.head.weight.data_ptr() != untied.embed.weight.data_ptr()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.zeros(0, 4),
        torch.arange(6).view(2, 3).t(),
        torch.randn(3, 4).to(torch.bfloat16),
        torch.randn(3).to(torch.float8_e4m3fn),
        torch.tensor([1 + 2j]),
        torch.tensor([True, False]),
        torch.arange(4, dtype=torch.int16),
        torch.ones(1).expand(3),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.tensor([float("nan"), -0.0]),
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}",
)
def test_a_tensor_of_any_kind_comes_back_in_place(tmp_path: Path, solo: Communicator, tensor: torch.Tensor) -> None:
    save(tmp_path / "c", {"t": tensor, "list": [tensor]}, solo)
    target = torch.zeros(tensor.shape, dtype=tensor.dtype)
    state = {"t": target}
    rest = load(tmp_path / "c", state, solo)
    assert state["t"] is target
    for back in (target, rest["list"][0]):
        assert back.dtype == tensor.dtype
        assert (
            back.contiguous().flatten().view(torch.uint8).tolist()
            == tensor.contiguous().flatten().view(torch.uint8).tolist()
        )


def test_plain_values_are_replaced_where_they_stand(tmp_path: Path, solo: Communicator) -> None:
    saved = {
        "step": 7,
        "best": 0.25,
        "run": {"tensor": torch.ones(1), "history": [1.0, 2.0]},
        "config": {"a": (1, None)},
    }
    save(tmp_path / "c", saved, solo)
    state: dict[str, Any] = {"step": 0, "best": None, "run": {"tensor": torch.zeros(1), "history": []}, "config": {}}
    run = state["run"]
    assert load(tmp_path / "c", state, solo) == {}
    assert state == saved
    assert state["run"] is run


def test_a_plain_value_takes_whatever_was_saved_there(tmp_path: Path, solo: Communicator) -> None:
    model = nn.Linear(2, 2)
    save(tmp_path / "c", {"model": model}, solo)
    state: dict[str, Any] = {"model": None}
    load(tmp_path / "c", state, solo)
    assert equal(state["model"]["weight"], model.weight)


def test_objects_get_back_what_their_state_dict_returned(tmp_path: Path, solo: Communicator) -> None:
    saved = Counter(epoch=3, nested={"t": torch.arange(3), "list": [torch.ones(1), "x"]}, none=None)
    save(tmp_path / "c", {"loader": saved}, solo)
    other = Counter()
    load(tmp_path / "c", {"loader": other}, solo)
    assert other.state["epoch"] == 3
    assert other.state["none"] is None
    assert equal(other.state["nested"]["t"], torch.arange(3))
    assert equal(other.state["nested"]["list"][0], torch.ones(1))
    assert other.state["nested"]["list"][1] == "x"


def test_learning_rate_schedulers_come_back(tmp_path: Path, solo: Communicator) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return model, optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [3])

    def advance(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler) -> float:
        optimizer.step()
        scheduler.step()
        return float(scheduler.get_last_lr()[0])

    model, optimizer, scheduler = build()
    for _ in range(5):
        advance(optimizer, scheduler)
    save(tmp_path / "c", {"m": model, "o": optimizer, "s": scheduler}, solo)
    other_model, other_optimizer, other_scheduler = build()
    load(tmp_path / "c", {"m": other_model, "o": other_optimizer, "s": other_scheduler}, solo)
    assert [advance(optimizer, scheduler) for _ in range(5)] == [
        advance(other_optimizer, other_scheduler) for _ in range(5)
    ]


def test_extra_state_of_a_module_comes_back(tmp_path: Path, solo: Communicator) -> None:
    class Extra(nn.Module):
        def __init__(self, extra: Any) -> None:
            super().__init__()
            self.extra = extra

        def get_extra_state(self) -> Any:
            return self.extra

        def set_extra_state(self, state: Any) -> None:
            self.extra = state

    save(tmp_path / "c", {"model": Extra({"scale": torch.tensor([2.0]), "names": ["a"]})}, solo)
    other = Extra(None)
    load(tmp_path / "c", {"model": other}, solo)
    assert equal(other.extra["scale"], torch.tensor([2.0]))
    assert other.extra["names"] == ["a"]


def test_hooks_that_run_after_a_state_dict_is_loaded_run(tmp_path: Path, solo: Communicator) -> None:
    model = nn.Linear(2, 2)
    save(tmp_path / "c", {"model": model}, solo)
    called: list[bool] = []
    model.register_load_state_dict_post_hook(lambda *_: called.append(True))
    load(tmp_path / "c", {"model": model}, solo)
    assert called == [True]


def test_weights_are_cast_to_the_models_floating_point_dtype(tmp_path: Path, solo: Communicator) -> None:
    model = nn.Linear(2, 2)
    save(tmp_path / "c", {"model": model}, solo)
    half = nn.Linear(2, 2).bfloat16()
    load(tmp_path / "c", {"model": half}, solo)
    assert torch.equal(half.weight, model.weight.bfloat16())


def test_everything_is_remainder_where_nothing_is_asked_for(tmp_path: Path, solo: Communicator, make_tied: Any) -> None:
    model = make_tied()
    save(tmp_path / "c", {"model": model, "deep": {"t": torch.ones(1), "v": 1}}, solo)
    for state in (None, {}):
        rest = load(tmp_path / "c", state, solo)
        assert equal(rest["model"]["norm.weight"], model.norm.weight)
        assert rest["model"]["head.weight"] is rest["model"]["embed.weight"]
        assert equal(rest["deep"]["t"], torch.ones(1))
        assert rest["deep"]["v"] == 1


def test_the_remainder_is_what_was_not_asked_for(tmp_path: Path, solo: Communicator) -> None:
    save(tmp_path / "c", {"a": {"t": torch.ones(1), "u": torch.zeros(1), "v": 1}, "b": {"x": 2}, "step": 3}, solo)
    rest = load(tmp_path / "c", {"a": {"t": torch.zeros(1)}, "step": 0}, solo)
    assert list(rest) == ["a", "b"]
    assert list(rest["a"]) == ["u", "v"]
    assert rest["b"] == {"x": 2}


def test_the_remainder_can_be_left_on_disk(tmp_path: Path, solo: Communicator) -> None:
    save(tmp_path / "c", {"a": torch.ones(1), "big": torch.ones(8)}, solo)
    assert load(tmp_path / "c", {"a": torch.zeros(1)}, solo, remainder=False) == {}


def test_a_checkpoint_can_be_saved_over_itself(tmp_path: Path, solo: Communicator) -> None:
    for step in range(3):
        save(tmp_path / "c", {"step": step, "t": torch.full((2,), float(step))}, solo)
    rest = load(tmp_path / "c", None, solo)
    assert rest["step"] == 2
    assert rest["t"].tolist() == [2.0, 2.0]
    assert [item.name for item in tmp_path.iterdir()] == ["c"]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trees)
def test_any_nesting_of_values_and_tensors_survives_the_disk(tmp_path: Path, solo: Communicator, tree: Any) -> None:
    save(tmp_path / "c", {"trees": [tree]}, solo)
    assert same(load(tmp_path / "c", None, solo)["trees"], [tree])


def test_an_empty_state_is_a_checkpoint(tmp_path: Path, solo: Communicator) -> None:
    save(tmp_path / "c", {}, solo)
    assert load(tmp_path / "c", None, solo) == {}


def test_the_files_say_nothing_about_where_they_were_written(tmp_path: Path, solo: Communicator) -> None:
    save(tmp_path / "c", {"t": torch.ones(1)}, solo)
    assert all(str(tmp_path).encode() not in item.read_bytes() for item in (tmp_path / "c").iterdir())
    assert json.loads((tmp_path / "c" / "nucleate.json").read_text())["version"] == 1


def test_torch_alone_reads_the_folder(tmp_path: Path, solo: Communicator) -> None:
    # The fact that users may rely on: the folder is DCP's, keyed by name in the state and FQN.
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    save(tmp_path / "c", {"model": model}, solo)
    with pytest.warns(UserWarning, match="single process"):
        dcp_load({"model": other.state_dict()}, storage_reader=FileSystemReader(tmp_path / "c"))
    assert same_bits(model, other)


def test_saving_leaves_the_state_alone(tmp_path: Path, solo: Communicator, make_tied: Any) -> None:
    model = make_tied()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(4)).sum().backward()
    optimizer.step()
    before = pickle.dumps([model.state_dict(), optimizer.state_dict()])
    save(tmp_path / "c", {"model": model, "optimizer": optimizer}, solo)
    assert pickle.dumps([model.state_dict(), optimizer.state_dict()]) == before
