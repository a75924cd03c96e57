"""Gradient accumulation on several ranks."""

from __future__ import annotations

from pathlib import Path

from tests.multi.ranks import fork_ranks


def test_micro_batches_on_two_ranks_make_the_step_of_one_large_batch() -> None:
    done = fork_ranks(Path(__file__).parent / "scripts" / "accumulation.py", 2)
    assert done.stdout.count("accumulated") == 2
