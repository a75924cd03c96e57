"""What `save` takes, refuses and leaves on disk, whatever the format."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nucleate.checkpoint import load, save
from nucleate.checkpoint.disk.lock import SaveLock
from nucleate.cluster import Communicator
from nucleate.errors import CheckpointError, ConfigurationError
from tests.device import equal

pytestmark = pytest.mark.usefixtures("factories_on_device")

#: Where each format is written to, and the option that it needs.
PLACES: list[tuple[str, str | None]] = [("c", None), ("c", "safetensors"), ("c.safetensors", None), ("c.pt", None)]


def tensors_at(path: Path) -> dict[str, Any]:
    """Return the tensors in a safetensors folder or file, or a torch file, by whoever made the format."""
    if path.is_dir():
        files = list(path.glob("model*.safetensors"))
        return {key: tensor for file in files for key, tensor in load_file(file).items()}
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    return dict(torch.load(path, weights_only=True))


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("c.pt", "dcp", "the ending .pt stands for one torch file"),
        ("c.bin", "safetensors", "the ending .bin stands for one torch file"),
        ("c.safetensors", "torch", "the ending .safetensors stands for one safetensors file"),
        ("c", "torch", "needs one of the endings .pt"),
        ("c", "zip", "must be one of 'dcp', 'safetensors', 'torch'"),
    ],
)
def test_a_format_that_contradicts_the_path_is_refused(
    tmp_path: Path, solo: Communicator, name: str, format: str, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        save(tmp_path / name, {"a": 1}, solo, format=format)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".PT"])
def test_every_ending_of_torch_files_makes_one(tmp_path: Path, solo: Communicator, suffix: str) -> None:
    path = tmp_path / f"c{suffix}"
    save(path, {"a": torch.ones(2)}, solo)
    assert torch.load(path, weights_only=True)["a"].tolist() == [1, 1]


def test_a_dot_in_the_name_of_a_folder_is_no_ending(tmp_path: Path, solo: Communicator) -> None:
    save(tmp_path / "step.100", {"a": 1}, solo)
    assert (tmp_path / "step.100").is_dir()


@pytest.mark.parametrize("size", ["", "GB", "-1", 0, "0.1", True, "5PB", None])
def test_a_shard_size_that_is_none_is_refused(tmp_path: Path, solo: Communicator, size: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_shard_size="):
        save(tmp_path / "c", {"a": 1}, solo, format="safetensors", max_shard_size=size)


@pytest.mark.parametrize(("name", "format"), PLACES)
def test_a_filter_chooses_what_is_saved_of_an_entry(
    tmp_path: Path, solo: Communicator, make_tied: Any, name: str, format: str | None
) -> None:
    model, other = make_tied(), nn.Linear(2, 2)
    state = {"model": model, "deep": {"other": other}, "plain": {"a": 1, "b": 2}}
    keep = {
        "model": lambda key, value: "head" in key and isinstance(value, torch.Tensor),
        "deep.other": lambda key, value: key == "bias",
        "plain": lambda key, value: value == 2,
    }
    save(tmp_path / name, state, solo, format=format, filter=keep)
    if name == "c" and format is None:
        rest = load(tmp_path / name, None, solo)
        assert list(rest["model"]) == ["head.weight"]
        assert equal(rest["model"]["head.weight"], model.head.weight)
        assert list(rest["deep"]["other"]) == ["bias"]
        assert rest["plain"] == {"b": 2}
        return
    found = tensors_at(tmp_path / name)
    if name == "c.pt":
        assert list(found["model"]) == ["head.weight"]
        assert equal(found["model"]["head.weight"], model.head.weight)
        assert found["plain"] == {"b": 2}
    else:
        assert sorted(found) == ["deep.other.bias", "model.head.weight"]
        assert equal(found["model.head.weight"], model.head.weight)


def test_the_filter_of_a_bare_module_is_a_function(tmp_path: Path, solo: Communicator) -> None:
    save(tmp_path / "c.safetensors", nn.Linear(2, 3), solo, filter=lambda key, value: key == "bias")
    assert list(load_file(tmp_path / "c.safetensors")) == ["bias"]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"modell": bool}, "filter names 'modell', but the entries of the state are 'model', 'step'"),
        ({"step": lambda key, value: True}, "step is a plain value, which has no keys"),
        ({"model": "weight"}, "it must be a function"),
        (lambda key, value: True, "it must be a dict"),
    ],
)
def test_a_filter_that_fits_nothing_is_refused(tmp_path: Path, solo: Communicator, filters: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        save(tmp_path / "c", {"model": nn.Linear(1, 1), "step": 1}, solo, filter=filters)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("name", "format"), PLACES)
def test_files_have_the_mode_that_the_process_gives_to_files(
    tmp_path: Path, solo: Communicator, name: str, format: str | None
) -> None:
    before = os.umask(0o027)
    try:
        save(tmp_path / name, {"a": torch.ones(2)}, solo, format=format)
    finally:
        os.umask(before)
    files = list((tmp_path / name).glob("*")) or [tmp_path / name]
    assert {stat.S_IMODE(item.stat().st_mode) for item in files} == {0o640}


@pytest.mark.parametrize(("name", "format"), PLACES)
def test_a_place_that_cannot_be_written_is_an_error_of_ours(
    tmp_path: Path, solo: Communicator, name: str, format: str | None
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "file" / name, {"a": torch.ones(2)}, solo, format=format)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["c.pt", "c.safetensors"])
def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path, solo: Communicator, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_text("")
    with pytest.raises(CheckpointError, match="is a folder, and its ending stands for a checkpoint of one file"):
        save(tmp_path / name, {"a": 1}, solo)
    assert os.listdir(tmp_path) == [name]
    assert os.listdir(tmp_path / name) == ["precious"]


@pytest.mark.parametrize(("name", "format"), PLACES)
def test_a_second_save_to_a_place_where_one_is_under_way_is_refused(
    tmp_path: Path, solo: Communicator, name: str, format: str | None
) -> None:
    save(tmp_path / name, {"a": torch.zeros(2)}, solo, format=format)
    lock = SaveLock(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"another save to .* is under way, by process {os.getpid()} on "):
        save(tmp_path / name, {"a": torch.ones(2)}, solo, format=format)
    lock.release()
    assert os.listdir(tmp_path) == [name]
    save(tmp_path / name, {"a": torch.ones(2)}, solo, format=format)
    assert os.listdir(tmp_path) == [name]


def test_processes_that_save_to_one_place_at_once_never_mix(tmp_path: Path, solo: Communicator) -> None:
    script = """
import sys, torch
from nucleate.checkpoint import save
from nucleate.cluster import Communicator, Environment
from nucleate.errors import CheckpointError
solo, number = Communicator(Environment(), torch.device("cpu")), float(sys.argv[2])
saved = refused = 0
print("ready", flush=True)
input()
while saved < 10:
    try:
        save(sys.argv[1], {"first": torch.full((5000,), number), "second": torch.full((5000,), number)}, solo)
        saved += 1
    except CheckpointError as error:
        assert "another save" in str(error), error
        refused += 1
print(refused)
"""
    path = tmp_path / "c.safetensors"
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", script, path, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for job in jobs:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
    for job in jobs:
        assert job.stdin is not None
        job.stdin.write("\n")
        job.stdin.flush()
    seen = set()
    while any(job.poll() is None for job in jobs):
        if path.exists():
            found = load_file(path)
            assert found["first"].unique().tolist() == found["second"].unique().tolist()
            seen.add(found["first"][0].item())
    refused = [int(job.communicate()[0]) for job in jobs]
    assert all(job.returncode == 0 for job in jobs)
    assert sum(refused), "they never met"
    assert len(seen) > 1
    assert os.listdir(tmp_path) == ["c.safetensors"]


@pytest.mark.parametrize(("name", "format"), PLACES)
def test_a_disk_that_is_full_leaves_the_previous_checkpoint(
    tmp_path: Path, solo: Communicator, name: str, format: str | None
) -> None:
    path = tmp_path / name
    save(path, {"a": torch.zeros(2)}, solo, format=format)
    before = {item: item.read_bytes() for item in [path, *path.rglob("*")] if item.is_file()}

    # The system lets no file of this process grow beyond that, as a full disk does not.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"File too large|fail"):
            save(path, {"a": torch.ones(100_000)}, solo, format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {item: item.read_bytes() for item in [path, *path.rglob("*")] if item.is_file()} == before
    assert os.listdir(tmp_path) == [name]


def test_no_thread_is_left_over(tmp_path: Path, solo: Communicator) -> None:
    before = threading.active_count()
    save(tmp_path / "c.safetensors", {"a": torch.ones(10_000_000)}, solo)
    assert threading.active_count() == before
