"""Checkpoints that are loaded inside `init_module`, on several ranks."""

from pathlib import Path

import pytest

from tests.device import cpu_only
from tests.multi.ranks import fork_ranks
from tests.multi.scripts.bound_files import CHECKS

SCRIPT = Path(__file__).parent / "scripts" / "bound_files.py"


@pytest.mark.long
@cpu_only("what a library loads for the CPU is bound to its file where the CPU is recorded for")
def test_every_promise_of_loading_inside_init_module_holds(tmp_path: Path) -> None:
    lines = fork_ranks(SCRIPT, 2, tmp_path, timeout=240).stdout.splitlines()
    assert all(lines.count(check.__name__) == 2 for check in CHECKS)
