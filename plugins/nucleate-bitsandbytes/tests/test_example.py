"""The example that loads a LLaMA in several ways, with those of this package."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "examples" / "03_quantized_inference.py"


def test_it_loads_and_generates_in_8_and_in_4_bits(tmp_path: Path) -> None:
    arguments = ["--size", "tiny", "--device", "cpu", "--tokens", "6", "--ways", "cde", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Left out" not in done.stdout
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = {row["way"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["b + lazy loading", "c + int8", "c + nf4"]
    # Eight bits are close enough to say the first word of full precision, which random words would once in 512 times.
    assert int(rows["c + int8"]["same_tokens"]) >= 1
    assert int(rows["c + nf4"]["same_tokens"]) < 6, "these are the weights of full precision"
    assert all(float(row["tokens_per_s"]) > 0 for row in rows.values())
