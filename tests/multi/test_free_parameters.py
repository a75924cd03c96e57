"""Parameters of optimizers that no model has, such as a learned temperature, on several ranks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks

SCRIPT = Path(__file__).parent / "scripts" / "free_parameters.py"


@pytest.mark.parametrize(("strategy", "nproc"), [("ddp", 2), ("fsdp", 2), ("fsdp", 3)])
def test_parameters_that_no_model_has_train_and_resume_as_in_one_process(
    tmp_path: Path, strategy: str, nproc: int
) -> None:
    done = fork_ranks(SCRIPT, nproc, strategy, tmp_path)
    checks = re.findall(r"^def (\w+)\(comm: ", SCRIPT.read_text(), re.MULTILINE)
    assert checks
    assert all(done.stdout.count(f"{check}\n") == nproc for check in checks)
