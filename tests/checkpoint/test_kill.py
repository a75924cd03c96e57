"""A save is whole or absent, wherever it is killed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.test_writer import PLACES


def killed(path: Path, format: str | None, how: str) -> dict[str, int]:
    script = Path(__file__).parent / "killed_saves.py"
    run = subprocess.run([sys.executable, script, path, format or "", how], capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr
    counts = re.findall(r"(\w+)=(\d+)", run.stdout)
    return {name: int(number) for name, number in counts}


@pytest.mark.parametrize(("name", "format"), PLACES)
def test_a_save_that_is_killed_before_any_of_its_steps_leaves_a_whole_checkpoint(
    tmp_path: Path, name: str, format: str | None
) -> None:
    counts = killed(tmp_path / name, format, "steps")
    # It was killed before and after the new one took the name, and of folders also in between, where neither has it.
    assert counts["kept"] >= 6
    assert counts["replaced"] >= 3
    assert (counts["stranded"] >= 1) == (name == "c")


@pytest.mark.parametrize(
    ("name", "format"),
    # Moments meet what steps do not know. A file and a folder suffice each time.
    [pytest.param(*place, marks=() if number in (0, 3) else pytest.mark.long) for number, place in enumerate(PLACES)],
)
def test_a_save_that_is_killed_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path: Path, name: str, format: str | None
) -> None:
    counts = killed(tmp_path / name, format, "moments")
    assert counts["kept"] >= 3
    assert counts["replaced"] >= 3
    assert counts["kept"] + counts["replaced"] == 30


@pytest.mark.parametrize("format", ["dcp", pytest.param(None, marks=pytest.mark.long, id="file")])
def test_saves_of_a_series_that_are_killed_before_any_of_their_steps_leave_nothing_for_ever(
    tmp_path: Path, format: str | None
) -> None:
    assert killed(tmp_path / "runs", format, "series")["steps"] >= 30
