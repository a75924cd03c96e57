"""Verification on several ranks: each looks at its own part, and a mistake of one is an error on all."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks

SCRIPT = Path(__file__).parent / "scripts" / "verification.py"


@pytest.mark.parametrize(("num_ranks", "strategies"), [(2, ["ddp", "fsdp"]), (4, ["hsdp"])])
def test_what_is_right_passes_and_what_one_rank_gets_wrong_is_named(num_ranks: int, strategies: list[str]) -> None:
    start = time.monotonic()
    done = fork_ranks(SCRIPT, num_ranks, *strategies)
    assert done.stdout.count("verified") == num_ranks
    # Nobody waits for a rank that has failed.
    assert time.monotonic() - start < 100
