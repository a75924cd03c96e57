"""ZeRO stage 1 by torch's `ZeroRedundancyOptimizer`."""

from __future__ import annotations

from pathlib import Path

from tests.multi.ranks import fork_ranks

SCRIPT = Path(__file__).parent / "scripts" / "zero.py"


def test_each_rank_saves_the_state_of_its_own_parameters_and_any_run_goes_on(tmp_path: Path) -> None:
    assert fork_ranks(SCRIPT, 2, tmp_path).stdout.count("done") == 2
