"""All ranks or none: what goes wrong on one rank ends every rank in seconds, with the reason."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.multi.ranks import run_ranks

SCRIPT = Path(__file__).parent / "scripts" / "faults.py"


@pytest.mark.parametrize(
    ("strategy", "fault", "message"),
    [
        ("ddp", "constructor", "[rank1]: ValueError: out of cheese"),
        ("ddp", "another optimizer", "RankFailedError: setup failed on rank 1"),
        ("fsdp", "another model", "RankDisagreementError: rank 1 constructed another model than rank 0"),
        ("fsdp", "training", "[rank1]: ValueError: out of cheese"),
    ],
)
def test_a_fault_on_one_rank_ends_all_of_them(strategy: str, fault: str, message: str) -> None:
    start = time.monotonic()
    done = run_ranks(SCRIPT, 2, strategy, fault, expected_rc=None)
    # Collectives would wait for ten minutes.
    assert time.monotonic() - start < 60
    assert message in done.stderr
    assert "trained" not in done.stdout


def test_clean_runs_in_a_row_all_exit_with_zero() -> None:
    for _ in range(5):
        done = run_ranks(SCRIPT, 2, "fsdp", "none")
        assert done.stdout.startswith("trained")
        assert "terminate called" not in done.stderr
