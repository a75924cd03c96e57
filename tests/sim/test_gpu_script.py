"""`tests/gpu/run_all.py` on the simulated device: its quick parts, what it reports, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu.llama_table import GIB, possible
from tests.gpu.parts import PARTS, Part, Result, Running
from tests.gpu.run_all import summary
from tests.multi.ranks import ROOT

SCRIPT = ROOT / "tests" / "gpu" / "run_all.py"


def run_script(*arguments: object, expected_rc: int = 0) -> str:
    command = [sys.executable, str(SCRIPT), "--device", "sim", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == expected_rc, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def run_part(tmp_path: Path, text: str, limit_s: float = 100) -> Result:
    """Run a file of tests as a part."""
    (tmp_path / "test_it.py").write_text(text)
    running = Running(Part("it", (str(tmp_path / "test_it.py"),), limit_s), "sim", tmp_path, limit_s)
    while (result := running.result()) is None:
        time.sleep(0.05)
    return result


def test_its_quick_parts_pass_and_are_reported(tmp_path: Path) -> None:
    parts = ("values", "sizes", "devices", "bitsandbytes", "stand-in")
    selected = "everything-float32 or offset or tiny or device or index or reason"
    said = run_script("--parts", *parts, "--select", selected, "--patience", 3, "--out", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["device"] == "sim"
    assert list(found["parts"]) == list(parts)
    outcomes = {name.rpartition("::")[2]: test["outcome"] for name, test in found["tests"].items()}
    assert outcomes["test_models_are_eagers[everything-float32]"] == "passed"
    assert outcomes["test_two_runtimes_on_two_devices_in_one_process_do_not_disturb_each_other"] == "passed"
    assert outcomes["test_a_model_is_loaded_in_its_own_bytes_and_one_buffer[tiny]"] == "passed"
    assert "failed" not in outcomes.values()
    reasons = {test["reason"] for test in found["tests"].values() if test["outcome"] == "not run"}
    assert "there are no CUDA kernels on the simulated device" in reasons
    assert all(f"  {reason}" in said for reason in reasons)
    assert "2 devices of type sim; torch" in said


def test_a_budget_that_is_spent_says_so(tmp_path: Path) -> None:
    said = run_script("--budget", 0.001, expected_rc=1)
    assert "the budget of 0 s was spent" in said


def test_failures_skips_and_measurements_are_reported(tmp_path: Path) -> None:
    result = run_part(
        tmp_path,
        "import pytest\n"
        "def test_good(record_property): record_property('ratio', 0.5)\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_left(): pytest.skip('no such thing')\n"
        "@pytest.fixture\ndef broken(): raise ValueError\n"
        "def test_broken(broken): pass\n",
    )
    found = {name.rpartition("::")[2]: test["outcome"] for name, test in result.tests.items()}
    assert found == {"test_good": "passed", "test_bad": "failed", "test_left": "not run", "test_broken": "failed"}
    assert result.failed
    said = summary("a machine", [result], 1.0)
    assert "assert 1 == 2" in said
    assert "1  no such thing" in said
    assert "test_good: ratio 0.5" in said


def test_a_test_that_hangs_ends_at_the_limit_and_keeps_what_was_reported(tmp_path: Path) -> None:
    text = "import time\ndef test_good(): pass\ndef test_hangs(): time.sleep(1000)\ndef test_behind(): pass\n"
    started = time.monotonic()
    result = run_part(tmp_path, text, limit_s=20)
    # The test would take 1000 s. Starting Python, pytest and torch may take a minute on a machine that is busy.
    assert time.monotonic() - started < 200
    found = {name.rpartition("::")[2]: test for name, test in result.tests.items()}
    assert found["test_good"]["outcome"] == "passed"
    assert found["test_behind"]["outcome"] == "not run"
    assert result.fault == "it was ended after 20 s"


def test_a_process_that_dies_is_a_failure(tmp_path: Path) -> None:
    result = run_part(tmp_path, "import os\ndef test_dies(): os._exit(3)\n")
    assert result.failed
    assert "pytest exited with 3" in result.fault


def test_every_file_of_tests_is_in_a_part() -> None:
    paths = {path for part in PARTS for path in part.paths}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "gpu").glob("test_*.py")} <= paths


@pytest.mark.parametrize(("device_gib", "host_gib", "left_out"), [(80, 128, ""), (24, 128, "b"), (24, 32, "ab")])
def test_ways_of_the_table_that_need_more_memory_are_left_out(device_gib: int, host_gib: int, left_out: str) -> None:
    ways, said = possible({"device_bytes": device_gib * GIB, "host_bytes": host_gib * GIB})
    assert "".join(sorted({*"abcdef"} - {*ways})) == left_out
    assert len(said) == len(left_out)
