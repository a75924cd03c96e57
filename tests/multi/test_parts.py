"""Models without a forward on two ranks."""

from __future__ import annotations

from pathlib import Path

from tests.multi.ranks import fork_ranks
from tests.multi.scripts.parts import CHECKS


def test_a_model_without_a_forward_trains_by_its_parts(tmp_path: Path) -> None:
    output = fork_ranks(Path(__file__).parent / "scripts" / "parts.py", 2, tmp_path, timeout=400).stdout
    assert all(output.count(f"{check.__name__}\n") == 2 for check in CHECKS)
