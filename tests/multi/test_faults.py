"""All ranks or none: what goes wrong on one rank ends every rank in seconds, with the reason."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.multi.ranks import fork_ranks, run_ranks

SCRIPT = Path(__file__).parent / "scripts" / "faults.py"


@pytest.mark.parametrize(
    ("run", "strategy", "fault", "message"),
    [
        (run_ranks, "ddp", "constructor", "[rank1]: ValueError: out of cheese"),
        (
            fork_ranks,
            "ddp",
            "another optimizer",
            "RankDisagreementError: the list of the optimizers' parameters that no model has is '' on rank 0 but",
        ),
        (fork_ranks, "fsdp", "another model", "RankDisagreementError: rank 1 constructed another model than rank 0"),
        (run_ranks, "fsdp", "training", "[rank1]: ValueError: out of cheese"),
        (fork_ranks, "ddp", "precision", "RankFailedError: setup failed on rank 1"),
        (fork_ranks, "fsdp", "precision", "RankFailedError: setup failed on rank 1"),
        (
            fork_ranks,
            "fsdp",
            "another precision",
            "RankDisagreementError: precision is \"Refusing(name='refusing')\" on rank 0 but",
        ),
        (fork_ranks, "fsdp", "another freezing", "RankDisagreementError: the list of frozen parameters is "),
    ],
)
def test_a_fault_on_one_rank_ends_all_of_them(run: Callable[..., Any], strategy: str, fault: str, message: str) -> None:
    start = time.monotonic()
    done = run(SCRIPT, 2, strategy, fault, expected_rc=None)
    # Collectives would wait for ten minutes.
    assert time.monotonic() - start < 60
    assert message in done.stderr
    assert "trained" not in done.stdout


def test_clean_runs_in_a_row_all_exit_with_zero() -> None:
    # Forked ranks end as scripts do, so most runs need no torchrun.
    for run in (run_ranks, *[fork_ranks] * 2):
        done = run(SCRIPT, 2, "fsdp", "none")
        assert done.stdout.startswith("trained")
        assert "terminate called" not in done.stderr
