"""Joining, splitting and transposing tensors between files and models on several ranks."""

from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks
from tests.multi.scripts.key_rules import CHECKS

SCRIPT = Path(__file__).parent / "scripts" / "key_rules.py"


@pytest.mark.parametrize("nproc", [pytest.param(2, marks=pytest.mark.long), 3])
def test_every_promise_of_rules_on_keys_holds_on(tmp_path: Path, nproc: int) -> None:
    lines = fork_ranks(SCRIPT, nproc, tmp_path, timeout=180).stdout.splitlines()
    assert all(lines.count(check.__name__) == nproc for check in CHECKS)
