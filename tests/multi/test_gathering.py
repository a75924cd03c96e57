"""Gathered parameters on several ranks: what code sees, and when a model may be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks
from tests.multi.scripts.gathering import CHECKS


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.long)])
def test_a_sharded_model_may_be_used_as_a_plain_one(nproc: int) -> None:
    output = fork_ranks(Path(__file__).parent / "scripts" / "gathering.py", nproc, timeout=400).stdout
    assert all(output.count(f"{check.__name__}\n") == nproc for check in CHECKS)
