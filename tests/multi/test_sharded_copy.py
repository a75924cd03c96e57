"""Copies of sharded models on two ranks."""

from __future__ import annotations

from pathlib import Path

from tests.multi.ranks import fork_ranks
from tests.multi.scripts.sharded_copy import CHECKS


def test_a_sharded_model_is_copied_and_averaged(tmp_path: Path) -> None:
    output = fork_ranks(Path(__file__).parent / "scripts" / "sharded_copy.py", 2, tmp_path, timeout=300).stdout
    assert all(output.count(f"{check.__name__}\n") == 2 for check in CHECKS)
