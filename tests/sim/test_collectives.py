from __future__ import annotations

import pytest

from tests.multi.ranks import fork_ranks, run_ranks

SCRIPT = "tests.sim.scripts.collectives"


@pytest.mark.parametrize("nproc", [2, 4])
def test_forked_ranks_train_and_save_as_on_the_cpu(nproc: int) -> None:
    result = fork_ranks(SCRIPT, nproc)
    assert result.stdout.count("done") == nproc


def test_ranks_of_torchrun_do_too() -> None:
    assert run_ranks(SCRIPT, 2).stdout.count("done") == 2
