"""`save(keys=)`: a model under the names and in the layout of another library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate.checkpoint import drop, inverse, open_checkpoint, rename, split, transpose
from nucleate.errors import CheckpointKeyError, ConfigurationError, ShapeMismatchError
from tests.checkpoint.test_tensor_map import RULES, Fused
from tests.device import ACCELERATOR

pytestmark = pytest.mark.usefixtures("factories_on_device")

TARGETS = {"safetensors": "folder", "dcp": "folder", "one file": "a.safetensors", "torch": "a.pt"}
# From the model to the file.
BACK: list[Any] = [*inverse(RULES[1:-1]), lambda key: f"model.{key}"]  # type: ignore[arg-type]


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(accelerator=ACCELERATOR, strategy="single_device")


def save(runtime: Runtime, tmp_path: Path, target: str, model: nn.Module, **options: Any) -> Path:
    place = tmp_path / TARGETS[target]
    handle = runtime.save(place, model, format=target if target in ("dcp", "safetensors") else None, **options)
    if handle is not None:
        handle.wait()
    return place


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_by_the_inverse_is_loaded_by_the_map(
    runtime: Runtime, tmp_path: Path, target: str, asynchronous: bool
) -> None:
    model, other = Fused(), Fused()
    place = save(runtime, tmp_path, target, model, keys=BACK, asynchronous=asynchronous)
    contents = open_checkpoint(place)
    assert "model.h.2.q.weight" in contents.tensors
    assert contents.tensors["model.h.2.mlp.weight"].shape == (32, 48)
    assert runtime.load_raw(place, other, keys=RULES).is_exact
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_an_asynchronous_save_holds_what_was_there_when_it_was_called(
    runtime: Runtime, tmp_path: Path, target: str
) -> None:
    model = nn.Linear(300, 200)
    before = model.weight.detach().clone()
    place = tmp_path / TARGETS[target]
    format = target if target in ("dcp", "safetensors") else None
    handle = runtime.save(place, model, format=format, keys=transpose("weight"), asynchronous=True)
    with torch.no_grad():
        model.weight.zero_()
    assert handle is not None
    handle.wait()
    found = torch.empty(300, 200)
    open_checkpoint(place).tensors["weight"].read(0, found.view(-1))
    assert torch.equal(found, before.t())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("target", TARGETS)
def test_ties_stay_ties_where_both_names_are_only_renamed(runtime: Runtime, tmp_path: Path, target: str) -> None:
    model = Tied()
    place = save(runtime, tmp_path, target, model, keys=[rename("embed.weight", "wte"), rename("head.weight", "out")])
    assert len(open_checkpoint(place).distinct()) == 1
    place = save(
        runtime, tmp_path / "two", target, model, keys=[rename("embed.weight", "wte"), transpose("head.weight")]
    )
    contents = open_checkpoint(place)
    assert [tensor.shape for tensor in contents.distinct()] == [(8, 4), (4, 8)]
    found = torch.empty(4, 8)
    contents.tensors["head.weight"].read(0, found.view(-1))
    assert torch.equal(found, model.embed.weight.t())


def test_a_part_may_be_left_out(runtime: Runtime, tmp_path: Path) -> None:
    model = nn.Linear(6, 4)
    runtime.save(tmp_path / "a.safetensors", model, keys=[split("weight", ["x", "y"], dim=1), drop("y")])
    contents = open_checkpoint(tmp_path / "a.safetensors")
    assert list(contents.tensors) == ["x", "bias"]
    found = torch.empty(4, 3)
    contents.tensors["x"].read(0, found.view(-1))
    assert torch.equal(found, model.weight[:, :3])


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (rename("nothing", "b"), CheckpointKeyError, "finds nothing in the model"),
        (rename("bias", "weight"), CheckpointKeyError, "bias becomes weight, but there is a weight already"),
        (split("weight", ["a", "b", "c"]), ShapeMismatchError, "cannot be divided into 3 equal parts"),
        (5, ConfigurationError, "is not a key map"),
    ],
)
def test_what_cannot_be_leaves_nothing(
    runtime: Runtime, tmp_path: Path, keys: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        runtime.save(tmp_path / "a.pt", nn.Linear(4, 4), keys=keys)
    assert list(tmp_path.iterdir()) == []


def test_a_training_state_is_not_renamed(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Save the model by itself"):
        runtime.save(tmp_path / "a", {"model": nn.Linear(2, 2)}, keys={"weight": "w"})


def test_other_values_of_a_module_are_kept(runtime: Runtime, tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"step": 3}

        def set_extra_state(self, state: Any) -> None:
            self.step = state["step"]

    runtime.save(tmp_path / "a.pt", Extra(3, 2), keys=transpose("weight"))
    assert open_checkpoint(tmp_path / "a.pt").at(("_extra_state",)) == {"step": 3}
