"""`gather_for_metrics` on several ranks, and on one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_results_of_all_samples_are_gathered_once_and_in_order(num_ranks: int) -> None:
    done = fork_ranks(Path(__file__).parent / "scripts" / "metric_gather.py", num_ranks)
    assert done.stdout.count("gathered") == num_ranks
