"""Saving between real processes, in every format."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.multi.ranks import fork_ranks, fork_unattended
from tests.multi.scripts.save import CHECKS, PLACES

SCRIPT = Path(__file__).parent / "scripts" / "save.py"


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.long)])
def test_every_promise_of_saving_holds_on(tmp_path: Path, nproc: int) -> None:
    lines = fork_ranks(SCRIPT, nproc, "checks", tmp_path, timeout=280).stdout.splitlines()
    assert all(lines.count(check.__name__) == nproc for check in CHECKS)


@pytest.mark.parametrize("index", range(len(PLACES)))
@pytest.mark.parametrize(("victim", "how"), [(0, "asynchronous"), (1, "at once")])
def test_ranks_notice_within_seconds_that_one_was_killed_while_saving(
    tmp_path: Path, victim: int, how: str, index: int
) -> None:
    # Without a launcher, which would end the others.
    codes, out, err = fork_unattended(SCRIPT, 3, "killed", tmp_path, victim, how, index)
    assert codes == [-signal.SIGKILL if rank == victim else 0 for rank in range(3)], err
    assert out == "noticed\n" * 2


def test_a_checkpoint_that_nobody_waits_for_is_written_before_the_interpreter_ends(tmp_path: Path) -> None:
    fork_ranks(SCRIPT, 2, "abandoned", tmp_path)
    assert os.listdir(tmp_path) == ["c.safetensors"]
    assert load_file(tmp_path / "c.safetensors")["rows"].dtype is torch.float32
