"""Ranks and their launcher: they end with torchrun, and ranks that were started by hand outlive their shell."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.multi.programs import all_end, lives, started, wait_for_ranks

SCRIPT = str(Path(__file__).parent / "scripts" / "launcher.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
#: A script of the user between torchrun and the rank.
WRAPPED = ("--no-python", "sh", "-c", '"$@"; true', "sh", sys.executable)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.mark.parametrize(
    ("num", "wrapper", "group"),
    [pytest.param(2, (), "ours", marks=pytest.mark.long), (2, WRAPPED, "users"), (1, (), "none")],
)
def test_ranks_end_when_torchrun_is_killed(num: int, wrapper: tuple[str, ...], group: str) -> None:
    with started(*TORCHRUN, str(num), *wrapper, SCRIPT, group) as torchrun:
        pids = wait_for_ranks(torchrun, num)
        time.sleep(0.5)
        assert all(map(lives, pids))
        torchrun.kill()
        assert all_end(pids)


def test_a_rank_that_was_started_by_hand_outlives_its_shell() -> None:
    place = "import os; os.environ.update(RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')"
    shell = f"import subprocess, sys; {place}; subprocess.run([sys.executable, {SCRIPT!r}, 'ours'])"
    with started("-c", shell) as process:
        (pid,) = wait_for_ranks(process, 1)
        process.kill()
        time.sleep(1.5)
        try:
            assert lives(pid)
        finally:
            os.kill(pid, signal.SIGKILL)
