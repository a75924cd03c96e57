"""What the strategies' keywords promise, on 2 ranks."""

from __future__ import annotations

from pathlib import Path

from tests.multi.ranks import fork_ranks


def test_every_policy_trains_as_one_process_does() -> None:
    done = fork_ranks(Path(__file__).parent / "scripts" / "policies.py", 2)
    assert done.stdout.count("all policies hold") == 2
