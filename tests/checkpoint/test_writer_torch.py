"""What torch files hold, read by torch's own code."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nucleate.checkpoint import save
from nucleate.cluster import Communicator
from nucleate.errors import CheckpointError
from tests.checkpoint.test_writer_safetensors import bits, every_dtype
from tests.device import equal

pytestmark = pytest.mark.usefixtures("factories_on_device")


def test_torch_reads_back_the_nested_state(tmp_path: Path, solo: Communicator, make_tied: Any) -> None:
    model = make_tied()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(4)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "step": 3, "deep": {"t": torch.ones(2), "list": [1, "a", None]}}
    save(tmp_path / "c.pt", state, solo)
    for options in ({}, {"mmap": True}):
        found = torch.load(tmp_path / "c.pt", weights_only=True, **options)
        assert found.keys() == {"model", "optimizer", "step", "deep", "nucleate"}
        assert found["step"] == 3
        assert found["deep"]["list"] == [1, "a", None]
        assert found["nucleate"] == {"version": 1, "sharded": {}, "modules": [("model",)]}
        assert found["model"].keys() == model.state_dict().keys()
        assert all(equal(found["model"][key], tensor) for key, tensor in model.state_dict().items())
        assert found["model"]["embed.weight"].data_ptr() == found["model"]["head.weight"].data_ptr()
        moments = found["optimizer"]["state"]["model.embed.weight"]
        assert equal(moments["exp_avg"], optimizer.state[model.embed.weight]["exp_avg"])


def test_a_bare_module_is_exactly_its_state_dict(tmp_path: Path, solo: Communicator) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    save(tmp_path / "c.pth", model, solo)
    found = torch.load(tmp_path / "c.pth", weights_only=True)
    assert type(found) is OrderedDict
    assert found._metadata == model.state_dict()._metadata
    other = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    other.load_state_dict(found, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_every_dtype_is_kept_bit_for_bit(tmp_path: Path, solo: Communicator) -> None:
    state = every_dtype() | {"wide": torch.tensor([1 + 2j, -0.0], dtype=torch.complex128).conj()}
    save(tmp_path / "c.pt", state, solo)
    found = torch.load(tmp_path / "c.pt", weights_only=True)
    assert {key: bits(found[key]) for key in state} == {key: bits(tensor) for key, tensor in state.items()}


def test_the_archive_is_sound_for_others_than_torch(tmp_path: Path, solo: Communicator) -> None:
    save(tmp_path / "c.pt", {"a": torch.randn(1000, 1000), "empty": torch.empty(0), "b": torch.randn(3)}, solo)
    with zipfile.ZipFile(tmp_path / "c.pt") as archive:
        assert archive.testzip() is None
        assert sorted(record.file_size for record in archive.infolist() if "/data/" in record.filename) == [
            0,
            12,
            4_000_000,
        ]


def test_a_torch_file_has_no_place_for_an_entry_of_our_name(tmp_path: Path, solo: Communicator) -> None:
    with pytest.raises(CheckpointError, match="an entry called nucleate"):
        save(tmp_path / "c.pt", {"nucleate": 1}, solo)
    assert os.listdir(tmp_path) == []
