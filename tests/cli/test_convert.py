"""`nucleate convert`: the arguments, and what is said of the result."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nucleate.checkpoint import open_checkpoint, verify
from nucleate.cli import convert
from tests.cli.commands import Here, run


def test_a_checkpoint_is_written_in_another_format(file: Path, tmp_path: Path) -> None:
    status, out, err = run("convert", file, tmp_path / "a.pt")
    assert (status, err) == (0, "")
    assert re.fullmatch(
        rf"{tmp_path}/a\.pt \(torch\): 4 tensors, 212 B, in \d+\.\d s from {file} \(safetensors\)\n", out
    )
    assert verify(tmp_path / "a.pt", against=file).is_good


@pytest.mark.parametrize("format", ["dcp", "safetensors"])
def test_a_folder_has_the_format_that_is_asked_for(here: Here, training: Path, tmp_path: Path, format: str) -> None:
    status, out, _ = here("convert", training, tmp_path / "out", "--format", format, "--max-shard-size", "600B")
    assert status == 0
    assert "4 tensors, 1.5 KiB, 1 tied" in out
    assert open_checkpoint(tmp_path / "out").format == format
    assert len(list((tmp_path / "out").glob("model-*"))) == (3 if format == "safetensors" else 0)
    assert verify(tmp_path / "out", against=training).is_good


def test_one_model_is_cast_and_renamed(here: Here, training: Path, tmp_path: Path) -> None:
    status, out, err = here(
        *("convert", training, tmp_path / "m.safetensors", "--only", "model", "--dtype", "bf16"),
        *("--keys", "^embed=tokens", r"(?<=\.)weight$=w"),
    )
    assert (status, err) == (0, "")
    assert "1 tensor, 256 B, 1 cast to bfloat16, 1 tied" in out
    (only,) = load_file(tmp_path / "m.safetensors").items()
    assert (only[0], only[1].dtype) == ("tokens.w", torch.bfloat16)
    assert here("convert", training, tmp_path / "p.pt", "--prefix", "optimizer.state.model.")[0] == 0
    assert "embed.weight.exp_avg" in torch.load(tmp_path / "p.pt", weights_only=True)


RULES = """
[[rule]]
concatenate = ["layers.0.weight", "layers.1.weight"]
to = "joined"
sizes = [1, 1]

[[rule]]
transpose = "joined"
"""


def test_a_file_of_rules_is_applied_and_undone(here: Here, file: Path, tmp_path: Path) -> None:
    (tmp_path / "map.toml").write_text(RULES)
    status, _, err = here("convert", file, tmp_path / "there.safetensors", "--keys", tmp_path / "map.toml")
    assert (status, err) == (0, "")
    found = load_file(tmp_path / "there.safetensors")
    assert set(found) == {"joined", "norm", "count"}
    assert torch.equal(found["joined"], torch.cat([torch.full((4, 6), 0.5), torch.full((4, 6), 1.5)]).t())
    arguments = ("--keys", tmp_path / "map.toml", "--inverse")
    assert here("convert", tmp_path / "there.safetensors", tmp_path / "back.pt", *arguments)[0] == 0
    assert verify(tmp_path / "back.pt", against=file).is_good


def test_what_is_there_is_replaced_by_force_only(here: Here, file: Path, tmp_path: Path) -> None:
    assert here("convert", file, tmp_path / "a.pt")[0] == 0
    status, _, err = here("convert", file, tmp_path / "a.pt")
    assert status == 2
    assert "exists already" in err
    assert "--force" in err
    assert here("convert", file, tmp_path / "a.pt", "--force", "--dtype", "fp32")[0] == 0
    assert torch.load(tmp_path / "a.pt", weights_only=True)["norm"].dtype is torch.float32


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["out", "--format", "torch"], "needs one of the endings"),
        (["a.pt", "--format", "dcp"], "contradicts the path"),
        (["out", "--max-shard-size", "big"], "max_shard_size='big'"),
        (["out", "--keys", "abc"], "--keys 'abc' must be REGEX=REPL"),
        (["out", "--keys", "(=b"], "not a regular expression"),
        (["out", "--keys", "map.toml"], "map.toml cannot be read as rules"),
        (["out", "--keys", "a=b", "--inverse"], "--inverse undoes the rules"),
        (["out", "--inverse"], "--inverse undoes the rules"),
        (["out", "--only", "model"], "has nothing at model"),
        (["out", "--prefix", "model."], "no key"),
    ],
)
def test_arguments_that_make_no_sense_are_status_2_and_leave_nothing(
    here: Here, file: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    status, _, err = here("convert", file, tmp_path / arguments[0], *arguments[1:])
    assert status == 2
    assert says in err
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize(
    ("argument", "pattern", "replacement"),
    [
        ("a=b", "a", "b"),
        ("a=", "a", ""),
        ("a=b=c", "a", "b=c"),
        (r"(?<=x)y(?=z)=\1", r"(?<=x)y(?=z)", r"\1"),
    ],
)
def test_a_renaming_is_split_where_it_is_meant(argument: str, pattern: str, replacement: str) -> None:
    assert convert._renaming(argument) == {pattern: replacement}


def test_a_bar_is_shown_for_what_takes_long(
    here: Here, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nucleate.report.meter.DELAY_S", -1.0)
    for target in (["a.pt"], ["out", "--format", "dcp"]):
        err = here("convert", file, tmp_path / target[0], *target[1:])[2]
        assert "writing: 100%" in err
        assert "B/s" in err
