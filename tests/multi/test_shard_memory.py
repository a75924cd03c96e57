"""No rank ever holds a model that it does not own."""

from __future__ import annotations

from pathlib import Path

from tests.multi.ranks import fork_ranks


def test_a_rank_takes_its_shards_and_never_a_whole_parameter() -> None:
    done = fork_ranks(Path(__file__).parent / "scripts" / "shard_memory.py", 2)
    assert done.stdout.count("MiB of 80") == 2
