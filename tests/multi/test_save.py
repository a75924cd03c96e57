"""Saving between real processes, in every format."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.multi.ranks import ROOT, run_ranks
from tests.multi.scripts.save import CHECKS, PLACES

SCRIPT = Path(__file__).parent / "scripts" / "save.py"


@pytest.mark.parametrize("nproc", [2, 4])
def test_every_promise_of_saving_holds_on(tmp_path: Path, nproc: int) -> None:
    lines = run_ranks(SCRIPT, nproc, "checks", tmp_path, timeout=280).stdout.splitlines()
    assert all(lines.count(check.__name__) == nproc for check in CHECKS)


@pytest.mark.parametrize("index", range(len(PLACES)))
@pytest.mark.parametrize(("victim", "how"), [(0, "asynchronous"), (1, "at once")])
def test_ranks_notice_within_seconds_that_one_was_killed_while_saving(
    tmp_path: Path, victim: int, how: str, index: int
) -> None:
    # Without a launcher, which would end the others.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, "killed", tmp_path, str(victim), how, str(index)],
            env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        for rank, process in enumerate(ranks):
            out, err = process.communicate(timeout=100)
            if rank == victim:
                assert process.returncode == -signal.SIGKILL
            else:
                assert (process.returncode, out) == (0, "noticed\n"), err
    finally:
        for process in ranks:
            process.kill()


def test_a_checkpoint_that_nobody_waits_for_is_written_before_the_interpreter_ends(tmp_path: Path) -> None:
    run_ranks(SCRIPT, 2, "abandoned", tmp_path)
    assert os.listdir(tmp_path) == ["c.safetensors"]
    assert load_file(tmp_path / "c.safetensors")["rows"].dtype is torch.float32
