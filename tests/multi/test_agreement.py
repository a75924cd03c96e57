"""Ranks that differ are brought together or told apart."""

from __future__ import annotations

from pathlib import Path

from tests.multi.ranks import fork_ranks


def test_what_differs_between_ranks_is_taken_from_rank_zero_or_refused() -> None:
    done = fork_ranks(Path(__file__).parent / "scripts" / "agreement.py", 2)
    assert done.stdout.count("the ranks agree") == 2
