"""Checkpoints between real processes."""

from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks
from tests.multi.scripts.checkpoint import CHECKS

SCRIPT = Path(__file__).parent / "scripts" / "checkpoint.py"


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.long)])
def test_every_promise_of_checkpoints_holds_on(tmp_path: Path, nproc: int) -> None:
    lines = fork_ranks(SCRIPT, nproc, "checks", tmp_path, timeout=240).stdout.splitlines()
    assert all(lines.count(check.__name__) == nproc for check in CHECKS)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_in_the_middle_of_a_save_leaves_the_previous_checkpoint(
    tmp_path: Path, rank: int
) -> None:
    fork_ranks(SCRIPT, 2, "killed", tmp_path, rank, expected_rc=None)
    if rank == 0:  # whom nobody could tidy up after
        assert len(list(tmp_path.glob(".last.draft-*"))) == 1
    fork_ranks(SCRIPT, 2, "survived", tmp_path)
