"""Tensors that only `reset_parameters` fills: the same bits on any number of ranks, and errors on all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks

SCRIPT = Path(__file__).parent / "scripts" / "resetting.py"


@pytest.mark.parametrize(
    ("num_ranks", "strategies"),
    [(2, ["ddp", "fsdp", "fsdp-linear"]), pytest.param(4, ["fsdp", "hsdp"], marks=pytest.mark.long)],
)
def test_ranks_make_what_the_calls_make_by_hand(num_ranks: int, strategies: list[str]) -> None:
    done = fork_ranks(SCRIPT, num_ranks, *strategies)
    assert done.stdout.count("holds") == num_ranks * len(strategies)
