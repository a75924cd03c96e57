"""Loggers on several ranks."""

from __future__ import annotations

from pathlib import Path

from tests.multi.ranks import fork_ranks


def test_rank_0_alone_writes_and_every_rank_knows_where(tmp_path: Path) -> None:
    done = fork_ranks(Path(__file__).parent / "scripts" / "loggers.py", 2, tmp_path)
    assert done.stdout.count("rank 0 alone writes") == 2
