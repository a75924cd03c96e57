"""How a group of real processes starts, ends and fails."""

import subprocess
import sys
import time
from pathlib import Path

from tests.multi.ranks import run_ranks

SCRIPT = Path(__file__).parent / "scripts" / "process_group.py"


def test_a_rank_that_raises_ends_the_others_within_seconds_with_its_traceback() -> None:
    start = time.monotonic()
    output = run_ranks(SCRIPT, 2, "raise", expected_rc=None)
    # The group's timeout is 60 s: nobody waited for it.
    assert time.monotonic() - start < 40
    assert "ValueError: out of cheese" in output.stderr
    assert "Traceback" in output.stderr


def test_restarted_workers_find_each_other_and_not_the_dead() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1", "--nproc-per-node"]
    output = subprocess.run([*command, "2", str(SCRIPT), "restart"], capture_output=True, text=True, timeout=120)
    assert output.returncode == 0, output.stderr
    assert output.stdout.count("attempt 1 ended") == 2
