"""Values of torch files that are not plain data: passed over where nobody asks for them, and refused by their names."""

from __future__ import annotations

import argparse
import collections
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate.checkpoint import convert, verify
from nucleate.checkpoint.readers import open_checkpoint
from nucleate.errors import CheckpointError, CheckpointKeyError, CheckpointNotFoundError, CheckpointUnreadableError

both_formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Own:
    """Leaves a trace where its code is run."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.trace),))


class Items(dict):  # type: ignore[type-arg]
    pass


class Names(list):  # type: ignore[type-arg]
    pass


FOREIGN: dict[str, Any] = {
    "namespace": (argparse.Namespace(a=1), "argparse.Namespace"),
    "path": (Path("/data"), "pathlib.PosixPath"),
    "numpy number": (np.float64(0.5), r"numpy\..*scalar"),
    "numpy array": (np.ones(3), r"numpy\..*_reconstruct"),
    "dict": (Items(width=4), "Items"),
    "list": (Names("ab"), "Names"),
    "defaultdict": (collections.defaultdict(list, a=[1]), "collections.defaultdict"),
    "deque": (collections.deque([1]), "collections.deque"),
    "as a key": ({argparse.Namespace: 1}, "argparse.Namespace"),
    "in a set": ({argparse.Namespace}, "argparse.Namespace"),
    "sparse tensor": (torch.eye(2).to_sparse(), "a sparse tensor"),
    "storage": (torch.ones(2).untyped_storage(), "a bare storage"),
    "module": (nn.Linear(1, 1), "whole module"),
}


@pytest.fixture
def trained() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(2, 2)


@both_formats
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_plain_data_is_refused_by_name_and_never_called_damaged(
    tmp_path: Path, kind: str, zipped: bool, trained: nn.Linear
) -> None:
    value, name = FOREIGN[kind]
    path, runtime = tmp_path / "a.ckpt", Runtime(accelerator="cpu")
    state = {"state_dict": trained.state_dict(), "hyper": {"value": value}}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    for call in (
        lambda: open_checkpoint(path),
        lambda: runtime.load(path),
        lambda: convert(path, tmp_path / "b.safetensors"),
    ):
        with pytest.raises(CheckpointUnreadableError, match=rf"hyper\.value in .*a\.ckpt is .*{name}") as error:
            call()
        assert "damage" not in str(error.value)
        assert len(str(error.value)) <= 1000


@both_formats
@pytest.mark.parametrize("kind", FOREIGN)
def test_weights_beside_it_are_loaded_by_their_prefix(
    tmp_path: Path, kind: str, zipped: bool, trained: nn.Linear
) -> None:
    path, runtime = tmp_path / "a.ckpt", Runtime(accelerator="cpu")
    state = {"state_dict": trained.state_dict(), "epoch": 3, "hyper": {"value": FOREIGN[kind][0]}}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    for prefix in ("state_dict.", ""):  # the second is found: it is the only module
        model = nn.Linear(2, 2)
        report = runtime.load_raw(path, model, prefix=prefix)
        assert torch.equal(model.weight, trained.weight)
        assert [one.key for one in report.passed_over] == ["hyper.value"]
        assert "passed over    1 not read: hyper.value (" in str(report)
    loaded: dict[str, Any] = {"state_dict": nn.Linear(2, 2), "epoch": 0}
    assert len(runtime.load(path, loaded).passed_over) == 1
    assert loaded["epoch"] == 3
    with pytest.raises(CheckpointError, match=r"hyper\.value"):
        runtime.load(path, {"hyper": None})
    done = convert(path, tmp_path / "b.safetensors", selection=_prefixed("state_dict."))
    assert done.passed_over[0].startswith("hyper.value (")
    assert verify(tmp_path / "b.safetensors").num_nan == 0
    report_of_all = verify(path, against=path)
    assert report_of_all.is_good
    assert len(report_of_all.not_read) == 2


def _prefixed(prefix: str) -> Any:
    from nucleate.checkpoint import Selection

    return Selection(prefix=prefix)


def test_no_code_runs_for_what_is_passed_over(tmp_path: Path, trained: nn.Linear) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": trained.state_dict(), "own": [Own(tmp_path / "trace")]}, path)
    runtime = Runtime(accelerator="cpu")
    # Not even if the user trusts the file, or has allowed the class.
    for weights_only in (None, False):
        runtime.load_raw(path, nn.Linear(2, 2), prefix="state_dict.", weights_only=weights_only)
    verify(path)
    convert(path, tmp_path / "b.pt", selection=_prefixed("state_dict."))
    assert not (tmp_path / "trace").exists()
    runtime.load(path, weights_only=False)
    assert (tmp_path / "trace").exists()


def test_an_object_under_the_prefix_or_around_it_is_refused(tmp_path: Path, trained: nn.Linear) -> None:
    runtime, path = Runtime(accelerator="cpu"), tmp_path / "a.pt"
    torch.save({"model": {**trained.state_dict(), "extra": Path("x")}, "other": 1}, path)
    with pytest.raises(CheckpointUnreadableError, match=r"model\.extra in .* is a pathlib\.PosixPath"):
        runtime.load_raw(path, nn.Linear(2, 2), prefix="model.")
    torch.save({"model": trained, "other": {"a": torch.ones(1)}}, path)
    with pytest.raises(CheckpointUnreadableError, match=r"model in .* is a torch\.nn\..*Linear: a whole module"):
        runtime.load_raw(path, nn.Linear(2, 2), prefix="model.")
    torch.save({"x": {"y": {"weight": torch.ones(1)}}, "own": Path("x")}, path)
    with pytest.raises(CheckpointNotFoundError, match="begins with 'z"):
        runtime.load_raw(path, nn.Linear(2, 2), prefix="z.")


def test_a_missing_prefix_is_suggested_before_an_object_is_refused(tmp_path: Path, trained: nn.Linear) -> None:
    beside = {"args": argparse.Namespace(), "head": torch.ones(1)}
    torch.save({"net": dict(trained.state_dict()), **beside}, tmp_path / "a.pt")
    with pytest.raises(CheckpointKeyError, match=r"Pass prefix='net\.'"):
        Runtime(accelerator="cpu").load_raw(tmp_path / "a.pt", nn.Linear(2, 2))


def test_an_optimizer_is_loaded_beside_an_object(tmp_path: Path, trained: nn.Linear) -> None:
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.5)
    torch.save({"optimizer": optimizer.state_dict(), "args": argparse.Namespace()}, tmp_path / "a.pt")
    fresh = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    Runtime(accelerator="cpu").load_raw(tmp_path / "a.pt", fresh, prefix="optimizer.")
    assert fresh.param_groups[0]["lr"] == 0.5


def test_a_whole_module_and_a_list_are_named(tmp_path: Path, trained: nn.Linear) -> None:
    torch.save(trained, tmp_path / "a.pt")
    with pytest.raises(CheckpointUnreadableError, match=r"a whole module, .*`torch\.save\(model\.state_dict"):
        open_checkpoint(tmp_path / "a.pt")
    torch.save([torch.ones(1)], tmp_path / "b.pt")
    with pytest.raises(CheckpointUnreadableError, match="holds a list. A checkpoint must be a dict"):
        open_checkpoint(tmp_path / "b.pt", passes_over=True)


def test_one_bare_tensor_is_inspected_verified_and_converted_but_not_loaded(tmp_path: Path) -> None:
    path, runtime = tmp_path / "scale.pth", Runtime(accelerator="cpu")
    torch.save(nn.Parameter(torch.tensor(2.65)), path)
    for call in (lambda: runtime.load(path), lambda: runtime.load_raw(path, nn.Linear(1, 1))):
        with pytest.raises(CheckpointUnreadableError, match="holds one tensor"):
            call()
    assert verify(path).is_good
    convert(path, tmp_path / "b.safetensors", keys={"tensor": "logit_scale"})
    assert float(runtime.load(tmp_path / "b.safetensors")["logit_scale"]) == float(torch.tensor(2.65))


def test_the_part_of_one_rank_is_named(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        torch.save({"weight": distribute_tensor(torch.ones(4), mesh)}, tmp_path / "a.pt")
    finally:
        dist.destroy_process_group()
    with pytest.raises(CheckpointUnreadableError, match=r"weight in .* is a DTensor: .* part of one rank.*full_tensor"):
        open_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "keys",
    [
        ["base_model.model.layer.lora_A.weight", "base_model.model.layer.lora_B.weight"],
        ["lora_unet_mid.lora_down.weight", "lora_unet_mid.lora_up.weight", "lora_unet_mid.alpha"],
    ],
)
def test_an_adapter_is_named(tmp_path: Path, keys: list[str]) -> None:
    torch.save({key: torch.ones(2, 2) for key in keys}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointKeyError, match=r"holds a LoRA adapter .*PeftModel\.from_pretrained"):
        Runtime(accelerator="cpu").load_raw(tmp_path / "adapter_model.bin", nn.Linear(2, 2), strict=False)


# --- ties


@both_formats
def test_a_load_gives_tensors_that_share_memory_as_torch_does(tmp_path: Path, zipped: bool) -> None:
    weight = torch.arange(12.0).view(3, 4)
    state = {"a": weight, "b": weight, "t": weight.t(), "part": [weight[1:, ::2]], "own": torch.ones(2)}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = Runtime(accelerator="cpu").load(tmp_path / "a.pt")
    assert found["a"] is found["b"]
    for key in ("a", "t", "own"):
        assert torch.equal(found[key], state[key]), key  # type: ignore[arg-type]
    assert torch.equal(found["part"][0], weight[1:, ::2])
    found["a"][1, 2] = -5
    assert found["t"][2, 1] == found["part"][0][0, 1] == -5
