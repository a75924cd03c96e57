"""`nucleate verify`: what is printed, and the exit status that scripts go by."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nucleate.checkpoint import convert
from tests.cli.commands import Here, run


def test_a_whole_checkpoint_is_status_0(file: Path) -> None:
    status, out, err = run("verify", file)
    assert (status, out, err) == (0, f"{file} (safetensors): 4 tensors, 212 B, read: whole\n", "")


def test_damage_is_printed_and_status_1(here: Here, file: Path, folder: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)
    status, out, err = here("verify", file)
    assert (status, err) == (1, "")
    assert out.startswith("damaged: ")
    assert str(file) in out
    assert out.splitlines()[-1].endswith(": damaged")
    (shard,) = folder.glob("model-00002*")
    shard.unlink()
    status, out, _ = here("verify", folder)
    assert status == 1
    assert shard.name in out


def test_two_checkpoints_are_compared_whatever_their_formats(here: Here, file: Path, tmp_path: Path) -> None:
    convert(file, tmp_path / "same.pt")
    status, out, _ = here("verify", file, "--against", tmp_path / "same.pt")
    assert (status, out.splitlines()[-1].endswith(f"whole, equal to {tmp_path}/same.pt")) == (0, True)
    torch.save({"norm": torch.zeros(6).bfloat16(), "layers.0.weight": torch.ones(6, 4)}, tmp_path / "other.pt")
    status, out, err = here("verify", file, "--against", tmp_path / "other.pt")
    assert (status, err) == (1, "")
    assert out.splitlines() == [
        f"unequal: count: int64 (), but missing in {tmp_path}/other.pt",
        f"unequal: layers.0.weight: float32 (4, 6) but float32 (6, 4) in {tmp_path}/other.pt",
        f"unequal: layers.1.weight: float32 (4, 6), but missing in {tmp_path}/other.pt",
        "unequal: norm: 6 of 6 elements differ, the first at [0]",
        f"{file} (safetensors): 4 tensors, 212 B, read: whole, 4 differences to {tmp_path}/other.pt",
    ]
    assert here("verify", file, "--against", tmp_path / "nowhere")[0] == 2
    os.truncate(tmp_path / "other.pt", 50)
    assert here("verify", file, "--against", tmp_path / "other.pt")[0] == 1


def test_a_hash_of_each_tensor_and_one_of_all_are_printed(here: Here, file: Path, tmp_path: Path) -> None:
    status, out, _ = here("verify", file, "--hash")
    assert status == 0
    lines = dict(line.split("  ", 1)[::-1] for line in out.splitlines()[:-1])
    assert lines["count"] == hashlib.sha256((3).to_bytes(8, "little")).hexdigest()
    assert set(lines) == {"count", "layers.0.weight", "layers.1.weight", "norm", "(all tensors)"}
    convert(file, tmp_path / "out", format="dcp")
    theirs = here("verify", tmp_path / "out", "--hash")[1].splitlines()
    assert sorted(theirs[:-1]) == sorted(out.splitlines()[:-1])


def test_what_is_not_finite_is_information(here: Here, tmp_path: Path) -> None:
    save_file({"w": torch.tensor([math.nan, math.inf, 1.0])}, tmp_path / "a.safetensors")
    status, out, _ = here("verify", tmp_path / "a.safetensors")
    assert status == 0
    assert out.splitlines()[0] == "not finite: w (3,): 1 NaN, 1 Inf"


def test_json_has_all_of_it(here: Here, file: Path, training: Path, tmp_path: Path) -> None:
    document = json.loads(here("verify", training, "--json", "--hash", "--against", training)[1])
    assert document["is_good"] is True
    assert len(document["sha256"]) == 64
    tensors = {one["key"]: one for one in document["tensors"]}
    assert tensors["model.head.weight"]["tied_to"] == "model.embed.weight"
    assert tensors["model.embed.weight"] == {
        "key": "model.embed.weight",
        "tied_to": None,
        "dtype": "float32",
        "shape": [16, 8],
        "num_nan": 0,
        "num_inf": 0,
        "sha256": tensors["model.head.weight"]["sha256"],
    }
    os.truncate(file, 50)
    status, out, _ = here("verify", file, "--json")
    assert status == 1
    damaged = json.loads(out)
    assert (damaged["is_good"], damaged["format"], damaged["tensors"], damaged["sha256"]) == (False, None, [], None)
    assert damaged["damage"][0]["key"] is None
    assert str(file) in damaged["damage"][0]["message"]


def test_a_bar_is_shown_for_what_takes_long(here: Here, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nucleate.report.meter.DELAY_S", -1.0)
    assert "verifying: 100%" in here("verify", file)[2]
    assert "comparing: 100%" in here("verify", file, "--against", file)[2]
