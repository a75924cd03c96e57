"""`nucleate inspect`: a table for people, JSON for programs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nucleate.checkpoint.stored import data_file
from nucleate.cli import text
from tests.cli.commands import Here, run


def test_the_table_shows_every_tensor_and_totals(file: Path) -> None:
    status, out, err = run("inspect", file)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "tensor           dtype     shape   size  file",
        "count            int64     scalar   8 B  a.safetensors",
        "layers.0.weight  float32   4x6     96 B  a.safetensors",
        "layers.1.weight  float32   4x6     96 B  a.safetensors",
        "norm             bfloat16  6       12 B  a.safetensors",
        "",
        "safetensors: 4 tensors, 55 parameters, 212 B in 1 file",
        "  float32   2 tensors  48 elements  192 B",
        "  bfloat16   1 tensor   6 elements   12 B",
        "  int64      1 tensor    1 element    8 B",
        "author: somebody",
    ]


def test_a_training_state_is_shown_with_its_entries(here: Here, training: Path) -> None:
    status, out, _ = here("inspect", training)
    assert status == 0
    lines = out.splitlines()
    assert any(
        line.split() == ["model.head.weight", "float32", "16x8", "tied", "to", "model.embed.weight"] for line in lines
    )
    assert "dcp, saved by nucleate: 4 tensors, 128 parameters, 1.5 KiB in 1 file" in lines
    assert lines[lines.index("entries") + 1 :] == [
        "  model      a model, 1 tensor, 512 B",
        "  optimizer  3 tensors, 1.0 KiB, 13 other values",
        "  step       3",
        "  config     3 values",
    ]


def test_all_values_are_shown_when_they_are_asked_for(here: Here, training: Path, file: Path) -> None:
    lines = here("inspect", training, "--values")[1].splitlines()
    shown = dict(line.split(maxsplit=1) for line in lines[lines.index("values") + 1 :])
    assert shown["optimizer.param_groups.0.lr"] == "0.001"
    assert shown["optimizer.param_groups.0.params.0"] == "'model.embed.weight'"
    assert (shown["step"], shown["config.names.1"]) == ("3", "None")
    assert here("inspect", file, "--values")[1].splitlines()[-1] == "no values"


def test_keys_are_chosen_by_a_regular_expression(here: Here, file: Path) -> None:
    _, out, _ = here("inspect", file, "--keys", r"layers\.\d")
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["layers.0.weight", "layers.1.weight"]
    assert "safetensors: 2 of 4 tensors, 48 parameters, 192 B in 1 file" in out
    assert here("inspect", file, "--keys", "nothing")[0] == 0
    status, _, err = here("inspect", file, "--keys", "(")
    assert status == 2
    assert "'(' is not a regular expression" in err


def test_json_is_complete(here: Here, file: Path, folder: Path, training: Path) -> None:
    status, out, _ = here("inspect", file, "--json")
    document = json.loads(out)
    begin = document["tensors"][0]["chunks"][0]["offset"]
    assert status == 0
    assert document == {
        "version": 1,
        "path": str(file),
        "format": "safetensors",
        "is_complete": False,
        "modules": [""],
        "num_tensors": 4,
        "num_parameters": 55,
        "size_bytes": 212,
        "dtypes": {
            "float32": {"num_tensors": 2, "num_elements": 48, "size_bytes": 192},
            "bfloat16": {"num_tensors": 1, "num_elements": 6, "size_bytes": 12},
            "int64": {"num_tensors": 1, "num_elements": 1, "size_bytes": 8},
        },
        "files": [{"name": "a.safetensors", "size_bytes": file.stat().st_size}],
        "notes": {"author": "somebody"},
        "values": [],
        "tensors": [
            {
                "key": key,
                "tied_to": None,
                "dtype": dtype,
                "shape": shape,
                "size_bytes": size_bytes,
                "sharded_dims": None,
                "chunks": [
                    {
                        "file": "a.safetensors",
                        "offset": begin + offset,
                        "begin": [0] * len(shape),
                        "shape": shape,
                        "stride": None,
                    }
                ],
            }
            for key, dtype, shape, offset, size_bytes in [
                ("count", "int64", [], 0, 8),
                ("layers.0.weight", "float32", [4, 6], 8, 96),
                ("layers.1.weight", "float32", [4, 6], 104, 96),
                ("norm", "bfloat16", [6], 200, 12),
            ]
        ],
    }
    assert len(json.loads(here("inspect", folder, "--json")[1])["files"]) == 4
    state = json.loads(here("inspect", training, "--json")[1])
    assert (state["modules"], state["is_complete"]) == (["model"], True)
    values = {one["key"]: one["value"] for one in state["values"]}
    assert values["step"] == 3
    assert values["config.lr"] == {"repr": "inf"}
    assert values["config.names.1"] is None
    tied = {one["key"]: one["tied_to"] for one in state["tensors"]}
    assert tied["model.head.weight"] == "model.embed.weight"
    assert tied["model.embed.weight"] is None


def test_no_tensor_is_read(here: Here, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_file.DataFile, "read_into", lambda *_: pytest.fail("read"))
    assert here("inspect", folder)[0] == 0


def test_an_empty_checkpoint_is_shown(here: Here, tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")
    assert here("inspect", tmp_path / "a.safetensors")[1].startswith("safetensors: 0 tensors, 0 parameters, 0 B")


def test_the_reader_may_be_named(here: Here, file: Path) -> None:
    os.rename(file, file.with_name("weights.xyz"))
    assert here("inspect", file.with_name("weights.xyz"))[0] == 1
    assert here("inspect", file.with_name("weights.xyz"), "--reader", "safetensors")[0] == 0
    status, _, err = here("inspect", file.with_name("weights.xyz"), "--reader", "safetensor")
    assert status == 2
    assert "Did you mean 'safetensors'?" in err


def test_a_table_is_cut_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [["tensor", "size", "file"], ["model.layers.0.attention.weight", "1 B", "model-00001-of-00002.safetensors"]]
    lines = text.table(rows, right=(1,), wide=60)
    assert max(map(len, lines)) == 60
    assert lines[1].startswith("model.layers.0.attention.weight   1 B  model-")
    assert lines[1].endswith("tensors")
    lines = text.table(rows, wide=45)
    assert max(map(len, lines)) == 45
    assert lines[1].startswith("model.lay...on.weight")
    assert text.table(rows)[1].split() == [rows[1][0], "1", "B", rows[1][2]]
    monkeypatch.setattr(text.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "77")
    assert text.width() == 77


def test_the_time_grows_with_the_number_of_tensors_and_not_with_its_square(here: Here, tmp_path: Path) -> None:
    def seconds(num_tensors: int) -> float:
        path = tmp_path / f"{num_tensors}.safetensors"
        save_file({f"layers.{number}.weight": torch.ones(2, 2) for number in range(num_tensors)}, path)
        # Of this process's own time: others may keep the machine busy.
        begin = time.process_time()
        status, out, _ = here("inspect", path)
        assert status == 0
        assert len(out.splitlines()) == num_tensors + 4
        return time.process_time() - begin

    seconds(10)
    # Ten times as many take about ten times as long. The square would be a hundred times.
    assert seconds(20_000) < 40 * seconds(2_000)
