"""A save is whole or absent, wherever it is killed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_a_save_that_is_killed_before_any_of_its_steps_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    script = Path(__file__).parent / "killed_saves.py"
    run = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    counts = re.search(r"steps=(\d+) kept=(\d+) replaced=(\d+) stranded=(\d+)", run.stdout)
    assert counts is not None, run.stdout
    steps, kept, replaced, stranded = map(int, counts.groups())
    # It was killed before and after the new one took the name, and in between, where neither has it.
    assert steps >= 15
    assert kept >= 8
    assert replaced >= 3
    assert stranded >= 1
