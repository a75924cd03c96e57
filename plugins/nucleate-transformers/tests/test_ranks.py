"""What holds on several ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
from scripts.ranks import CHECKS, CHECKS_ON_4
from torchrun import run_ranks


@pytest.mark.parametrize(("nproc", "checks"), [(2, CHECKS), pytest.param(4, CHECKS_ON_4, marks=pytest.mark.long)])
def test_every_promise_across_ranks_holds_on(nproc: int, checks: list[Callable[[Path], None]], tmp_path: Path) -> None:
    output = run_ranks("ranks.py", nproc, tmp_path)
    assert [output.count(f"{check.__name__}: kept") for check in checks] == [nproc] * len(checks)
