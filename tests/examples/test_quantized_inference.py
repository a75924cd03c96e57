"""The example that compares ways to load: they say the same words, and its table, log and chart hold what it measured.

The quantized ways are run by the tests of nucleate-bitsandbytes, where that is installed.
"""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nucleate.registry import PRECISIONS
from tests.multi.ranks import ROOT

SCRIPT = ROOT / "examples" / "03_quantized_inference.py"
TINY = ("--size", "tiny", "--device", "cpu", "--tokens", "6")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # as python does for the script it runs
    spec = importlib.util.spec_from_file_location("quantized_inference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_quantization(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in PRECISIONS.names() if not name.startswith("bnb")]
    monkeypatch.setattr(example, "PRECISIONS", SimpleNamespace(names=lambda: names))


def test_full_precision_says_the_same_whichever_way_it_is_loaded(
    example: ModuleType, no_quantization: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main([*TINY, "--folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "Left out: d, e, for which `pip install nucleate-bitsandbytes`." in printed
    table = (tmp_path / "table.md").read_text()
    assert table in printed
    assert [row.split("|")[1].strip() for row in table.splitlines() if row.startswith(("| a", "| b", "| c"))] == [
        "a: plain PyTorch",
        "b: bf16 on the device",
        "c: b + lazy loading",
    ]
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["same_tokens"] for row in rows] == ["6"] * 3
    assert len({row["tokens"] for row in rows}) == 1
    assert all(float(row["load_s"]) > 0 and float(row["tokens_per_s"]) > 0 for row in rows)
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_weights_that_are_there_are_used_and_those_of_others_are_taken(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main([*TINY, "--ways", "c", "--folder", str(tmp_path)])
    capsys.readouterr()
    folder = tmp_path / "llama-tiny"
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    # A head of zeros finds every token equally likely: the first one is said.
    save_file(tensors | {"lm_head.weight": torch.zeros(512, 128)}, tmp_path / "other.safetensors")
    example.main([*TINY, "--ways", "ac", "--folder", str(tmp_path), "--weights", str(tmp_path / "other.safetensors")])
    assert "Writing" not in capsys.readouterr().out
    with (tmp_path / "table.csv").open(newline="") as file:
        assert [row["tokens"] for row in csv.DictReader(file)] == [str([0] * 6)] * 2


def test_the_peak_of_a_measured_piece_is_what_it_took_though_it_gave_it_back(
    example: ModuleType, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "from fresh_process import measured, report\n"
        "before = bytearray(b'x' * 2**26)\n"
        "with measured():\n"
        "    taken = bytearray(b'x' * 2**25)\n"
        "    time.sleep(0.1)\n"
        "    del taken\n"
        "after = bytearray(b'x' * 2**27)\n"
        "report({'said': 1})\n"
    )
    result = example.run_watched([str(script)])
    assert result["said"] == 1
    assert 2**25 <= result["anonymous_bytes"] < 2**26.5


def test_a_way_that_fails_ends_the_example_with_what_it_said(example: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes(b"no header")
    with pytest.raises(SystemExit, match="other.safetensors"):
        example.main(
            [*TINY, "--ways", "c", "--folder", str(tmp_path), "--weights", str(tmp_path / "other.safetensors")]
        )


def test_nothing_to_measure_is_refused(example: ModuleType, no_quantization: None, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="leaves nothing"):
        example.main([*TINY, "--ways", "de", "--folder", str(tmp_path)])
