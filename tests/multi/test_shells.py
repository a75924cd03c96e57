"""Shells of other libraries between real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks
from tests.multi.scripts.shells import CHECKS


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.long), "fsdp"])
def test_shells_change_neither_training_nor_names_on_two_ranks(tmp_path: Path, strategy: str) -> None:
    output = fork_ranks(Path(__file__).parent / "scripts" / "shells.py", 2, strategy, tmp_path).stdout
    assert all(output.count(check.__name__) == 2 for check in CHECKS)
