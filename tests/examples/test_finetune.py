"""The example that starts from trained weights: it reads what the first one saved, and learns faster for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nucleate import Runtime
from tests.multi.ranks import ROOT, run_ranks

EXAMPLES = ROOT / "examples"
TINY = ("--size", "tiny", "--accelerator", "cpu", "--batch-size", "4")

Main = Callable[[list[str]], None]


def load(name: str) -> Main:
    spec = importlib.util.spec_from_file_location(name.partition("_")[2], EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main  # type: ignore[no-any-return]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    arguments = ["--out", str(tmp_path), "--steps", "150", "--learning-rate", "1e-2", "--sample-bytes", "4"]
    load("01_train_gpt")([*TINY, *arguments])
    return tmp_path / "checkpoint"


def run(tmp_path: Path, *arguments: object) -> dict[str, torch.Tensor]:
    out = tmp_path / "tuned.safetensors"
    load("02_finetune")([*TINY, "--out", str(out), *map(str, arguments)])
    return load_file(out)


def test_it_starts_from_what_was_trained_and_only_the_head_is_new(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = run(tmp_path, "--weights", trained, "--frozen", "--mmap", "--steps", 3)
    assert tuned["gpt.head.weight"].shape == (2, 32)
    printed = capsys.readouterr().out
    assert "mismatched" in printed
    assert "gpt.head.weight ((2, 32) here but (256, 32) in the checkpoint)" in printed
    before = Runtime(accelerator="cpu").load(trained)["model"]
    frozen = [name for name in before if not name.startswith("head")]
    assert len(frozen) == 14
    assert all(torch.equal(tuned[f"gpt.{name}"], before[name]) for name in frozen)


def test_trained_weights_help(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = {}
    for weights in (trained, "none"):
        run(tmp_path, "--weights", weights, "--steps", 30, "--frozen", "--learning-rate", 1e-2)
        ends[str(weights)] = float(capsys.readouterr().out.split(" at the end")[0].split()[-1])
    assert ends[str(trained)] < ends["none"]


def test_it_runs_on_two_processes(trained: Path, tmp_path: Path) -> None:
    script = EXAMPLES / "02_finetune.py"
    out = tmp_path / "tuned"
    run_ranks(script, 2, *TINY, "--strategy", "fsdp", "--steps", 4, "--weights", trained, "--out", out)
    assert out.is_dir()
