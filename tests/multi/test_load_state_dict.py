"""`load_state_dict` on a deferred model, on several ranks."""

from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks
from tests.multi.scripts.load_state_dict import CHECKS

SCRIPT = Path(__file__).parent / "scripts" / "load_state_dict.py"


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.long)])
def test_every_promise_of_load_state_dict_holds_on(tmp_path: Path, nproc: int) -> None:
    lines = fork_ranks(SCRIPT, nproc, tmp_path, timeout=180).stdout.splitlines()
    assert all(lines.count(check.__name__) == nproc for check in CHECKS)
