"""`Runtime(plugins=...)`: one plugin or several, sorted by kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate.accelerators import CPUAccelerator
from nucleate.checkpoint import Reader
from nucleate.checkpoint.readers.torch.torch_file import TorchReader
from nucleate.checkpoint.saving import Snapshot
from nucleate.checkpoint.stored import Contents
from nucleate.checkpoint.writers import Writer
from nucleate.checkpoint.writers.torch_file import TorchFileWriter
from nucleate.cluster import Environment
from nucleate.errors import ConfigurationError
from nucleate.precision import FullPrecision, HalfPrecision
from nucleate.strategies import FSDPStrategy


class BackwardsWriter(Writer):
    """Writes torch's format with all bytes in reverse."""

    name = "backwards"
    suffixes = (".sdrawkcab",)
    writes_folders = False

    def write(self, snapshot: Snapshot, draft: Path, group: Any) -> None:
        TorchFileWriter().write(snapshot, draft, group)
        draft.write_bytes(draft.read_bytes()[::-1])


class BackwardsReader(Reader):
    name = "backwards"

    def claims(self, path: Path) -> bool:
        return path.suffix == ".sdrawkcab"

    def read(self, path: Path) -> Contents:
        forwards = path.with_suffix(".pt")
        forwards.write_bytes(path.read_bytes()[::-1])
        return TorchReader().read(forwards)


def runtime(plugins: Any, **arguments: Any) -> Runtime:
    return Runtime(accelerator="cpu", plugins=plugins, **arguments)


def test_a_precision_may_be_a_plugin() -> None:
    assert runtime(HalfPrecision(torch.bfloat16)).precision.name == "bf16-true"
    assert runtime([FullPrecision(torch.float64)]).precision.name == "64-true"


def test_a_given_environment_takes_the_place_of_the_launchers_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "not read")
    monkeypatch.setenv("WORLD_SIZE", "not read")
    one = runtime((Environment("mine", world_size=6, global_rank=5, local_world_size=2, local_rank=1, node_rank=2),))
    assert (one.world_size, one.global_rank, one.local_rank, one.node_rank) == (6, 5, 1, 2)
    assert type(one.strategy).__name__ == "DDPStrategy"


def test_a_given_reader_and_writer_serve_this_runtime_by_name_and_by_ending(tmp_path: Path) -> None:
    one = runtime([BackwardsReader(), BackwardsWriter()])
    model = nn.Linear(3, 2)
    saved = model.weight.clone()
    path = tmp_path / "weights.sdrawkcab"
    one.save(path, {"model": model, "step": 3})
    with torch.no_grad():
        model.weight.zero_()
    state = {"model": model, "step": 0}
    one.load(path, state)
    assert torch.equal(model.weight, saved)
    assert state["step"] == 3
    other = nn.Linear(3, 2)
    one.load_raw(path.rename(tmp_path / "other.name"), other, prefix="model.", reader="backwards")
    assert torch.equal(other.weight, saved)
    one.save(tmp_path / "plain.pt", model)
    one.load(tmp_path / "plain.pt", model)
    with pytest.raises(ConfigurationError, match="format='backwards' is one file"):
        one.save(tmp_path / "folder", model, format="backwards")
    with pytest.raises(ConfigurationError, match="format='backwards' must be one of 'dcp'"):
        runtime(None).save(tmp_path / "folder", model, format="backwards")


@pytest.mark.parametrize(
    ("plugins", "arguments", "message"),
    [
        (FullPrecision(torch.float32), {"precision": "bf16-true"}, "precision='bf16-true' is given too"),
        ([FullPrecision(torch.float32), FullPrecision(torch.float64)], {}, "2 plugins of the kind precision"),
        ([Environment(), Environment()], {}, "2 plugins of the kind environment"),
        ([BackwardsReader(), BackwardsReader()], {}, "2 readers named 'backwards'"),
        ([type("Nameless", (BackwardsWriter,), {"name": ""})()], {}, "has no name"),
        (3, {}, "has 3, which is not a plugin of these kinds"),
        (FullPrecision, {}, "which is not a plugin of these kinds"),
        ("16-mixed", {}, r"has '16-mixed', which is not.*Give it to Runtime\(precision=...\)"),
        (CPUAccelerator(), {}, r"Give it to Runtime\(accelerator=...\)"),
        ([FSDPStrategy()], {}, r"Give it to Runtime\(strategy=...\)"),
    ],
)
def test_what_cannot_be_meant_is_refused(plugins: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        runtime(plugins, **arguments)


def test_objects_of_fabric_are_refused_by_the_name_of_their_counterpart() -> None:
    environment = type("MyCluster", (type("ClusterEnvironment", (), {"__module__": "lightning.fabric.plugins"}),), {})
    with pytest.raises(ConfigurationError, match=r"plugins=...: MyCluster belongs to lightning.fabric.*Environment"):
        runtime([environment()])


def test_the_full_state_dict_type_refuses_a_folder(tmp_path: Path) -> None:
    one = runtime(None, strategy=FSDPStrategy(state_dict_type="full"))
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match="stands for a folder, but state_dict_type='full'.*ends in .*.pt"):
        one.save(tmp_path / "checkpoint", model)
    one.save(tmp_path / "checkpoint.pt", model)
    one.save(tmp_path / "folder", model, format="safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "folder"]
