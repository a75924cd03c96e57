"""Wrappers, precision and seeds between real processes."""

from pathlib import Path

from tests.multi.ranks import fork_ranks
from tests.multi.scripts.wrappers import CHECKS


def test_wrappers_precision_and_seeds_keep_their_promises_on_two_ranks() -> None:
    output = fork_ranks(Path(__file__).parent / "scripts" / "wrappers.py", 2).stdout
    assert all(output.count(check.__name__) == 2 for check in CHECKS)
