from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate.checkpoint.disk.address import is_address
from nucleate.checkpoint.tools.verifier import verify
from nucleate.errors import CheckpointError, CheckpointNotFoundError, ConfigurationError


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a file system in memory, whose copies go to a folder of this test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "copies"))
    (tmp_path / "copies").mkdir()
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(accelerator="cpu")


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "folder", "safetensors-folder"])
@pytest.mark.parametrize("empty_init", [True, False])
def test_a_model_is_loaded_from_an_address(
    bucket: Any, runtime: Runtime, tmp_path: Path, name: str, empty_init: bool
) -> None:
    saved = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    runtime.save(tmp_path / name, saved, format="safetensors" if name == "safetensors-folder" else None)
    bucket.put(str(tmp_path / name), f"/bucket/{name}", recursive=True)
    with runtime.init_module(empty_init=empty_init):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    runtime.load_raw(f"memory://bucket/{name}", model)
    model = runtime.setup(model)
    for key, value in saved.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    gc.collect()
    assert os.listdir(tempfile.gettempdir()) == []


def test_a_training_state_is_loaded_from_an_address(bucket: Any, runtime: Runtime, tmp_path: Path) -> None:
    runtime.save(tmp_path / "last", {"weights": torch.arange(5.0), "step": 3})
    bucket.put(str(tmp_path / "last"), "/bucket/last", recursive=True)
    state = {"weights": torch.zeros(5), "step": 0}
    runtime.load("memory://bucket/last", state)
    assert state["step"] == 3
    assert torch.equal(state["weights"], torch.arange(5.0))
    assert verify("memory://bucket/last").is_good


def test_an_address_with_nothing_is_named(bucket: Any, runtime: Runtime) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint at memory://bucket/nothing"):
        runtime.load("memory://bucket/nothing")
    assert os.listdir(tempfile.gettempdir()) == []


def test_a_copy_that_fails_names_the_address_and_leaves_nothing(
    bucket: Any, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe("/bucket/a.pt", b"1234")
    monkeypatch.setattr(type(bucket), "get_file", lambda *_, **__: 1 / 0)
    with pytest.raises(CheckpointError, match="memory://bucket/a.pt cannot be copied to .*ZeroDivisionError.*TMPDIR"):
        runtime.load("memory://bucket/a.pt")
    assert os.listdir(tempfile.gettempdir()) == []


def test_a_scheme_that_nobody_reads_is_refused(runtime: Runtime) -> None:
    with pytest.raises(ConfigurationError, match="nowhere://a.pt cannot be read: fsspec knows no scheme 'nowhere'"):
        runtime.load("nowhere://a.pt")


def test_the_package_that_a_scheme_needs_is_named(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigurationError, match="s3://bucket/a.pt cannot be read: .*s3fs"):
        runtime.load("s3://bucket/a.pt")


def test_without_fsspec_an_address_is_refused_by_name(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigurationError, match="s3://bucket/a.pt is an address.*pip install fsspec"):
        runtime.load("s3://bucket/a.pt")


def test_a_save_to_an_address_is_refused(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=r"save needs a local path, and 's3://bucket/last' is an address.*put"):
        runtime.save("s3://bucket/last", nn.Linear(2, 2))
    assert os.listdir(tmp_path) == []


def test_local_paths_are_no_addresses() -> None:
    assert not any(map(is_address, ("a.pt", "/tmp/a", "C:/models", "a:b", "./s3:/a", Path("s3:/a"))))
    assert all(map(is_address, ("s3://a", "gs://a/b", "hf://a/b", "file:///tmp/a", "abfs+x://a")))
