"""The example that loads a LLaMA in several ways, with those of this package."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "examples" / "03_quantized_inference.py"


def test_8_and_4_bits_keep_fewer_bytes_and_nearly_the_loss(tmp_path: Path) -> None:
    arguments = ["--size", "tiny", "--device", "cpu", "--tokens", "3", "--train-steps", "60", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--ways", "d", "e", "f"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Left out" not in done.stdout
    with (tmp_path / "table.csv").open(newline="") as file:
        full, int8, nf4 = csv.DictReader(file)
    assert [row["way"] for row in (full, int8, nf4)] == ["d: lazy: init_module, load_raw", "e: d + int8", "f: d + nf4"]
    assert float(full["kept_bytes"]) > float(int8["kept_bytes"]) > float(nf4["kept_bytes"])
    # An untrained byte model has a loss of 5.5.
    loss = float(full["loss"])
    assert loss < 3
    assert float(int8["loss"]) != loss
    assert abs(float(int8["loss"]) - loss) < 0.01
    assert float(nf4["loss"]) != float(int8["loss"])
    assert abs(float(nf4["loss"]) - loss) < 0.05
    assert all(float(row["tokens_per_s"]) > 0 for row in (full, int8, nf4))
