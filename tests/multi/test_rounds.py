"""A process that makes many models, one after the other, keeps none of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.multi.ranks import ROOT, fork_ranks

SCRIPT = Path(__file__).parent / "scripts" / "rounds.py"


@pytest.mark.parametrize(
    ("strategy", "rounds"),
    [
        ("fsdp", 60),
        pytest.param("ddp", 200, marks=pytest.mark.long),
        pytest.param("fsdp", 200, marks=pytest.mark.long),
    ],
)
def test_models_are_freed_on_two_ranks(tmp_path: Path, strategy: str, rounds: int) -> None:
    assert fork_ranks(SCRIPT, 2, strategy, rounds, tmp_path).stdout.count(f"{rounds} rounds") == 2


@pytest.mark.long
def test_models_are_freed_in_one_process(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "single_device", "200", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "200 rounds" in done.stdout
