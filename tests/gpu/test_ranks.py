"""Two processes with a device each, started by torchrun: NCCL on CUDA."""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path

import pytest

from tests.gpu.scripts.ranks import CHECKS, STRATEGIES
from tests.multi.ranks import run_ranks

pytestmark = [pytest.mark.cuda, pytest.mark.two_gpus]
SCRIPTS = Path(__file__).parent / "scripts"


@functools.cache
def outcomes(strategy: str) -> dict[str, str]:
    """Run all checks of a strategy, the first time that it is asked for: in one launch, if none fails.

    Returns:
        For each check an empty text, or what the ranks said when it failed.
    """
    found: dict[str, str] = {}
    while left := [check.__name__ for check in CHECKS if check.__name__ not in found]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            failure = "the run ended without this check"
            try:
                run_ranks("tests.gpu.scripts.ranks", 2, strategy, folder, *left, timeout=150)
            except AssertionError as error:
                failure = str(error)
            passed = (folder / "passed").read_text().split() if (folder / "passed").exists() else []
            said = "\n".join(path.read_text() for path in sorted(folder.glob("failed-*")))
        found.update(dict.fromkeys(passed, ""))
        # What runs behind a check that failed would wait for a rank that has ended.
        failed = next((check for check in left if check not in passed), None)
        if failed is not None:
            found[failed] = said or failure
    return found


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_holds_on_two_devices(strategy: str, check: str) -> None:
    """Weights, training, clipping, accumulation, files, checkpoints, generators and memory on two GPUs."""
    failure = outcomes(strategy)[check]
    assert not failure, failure


@pytest.mark.parametrize("name", ["TestDDP", "TestFSDP"])
def test_a_strategy_passes_its_suite_on_two_devices(name: str) -> None:
    """The strategy suite that plugins inherit, one pytest for each of two GPUs."""
    # -x, because a rank that fails a test and goes on leaves the others waiting for it in the last one.
    done = run_ranks("pytest", 2, "-x", "-q", f"tests/gpu/test_conformance.py::{name}", timeout=200)
    assert done.stdout.count(" passed") == 2


@pytest.mark.parametrize(
    ("strategy", "fault"), [("ddp", "constructor"), ("ddp", "training"), ("fsdp", "setup"), ("fsdp", "training")]
)
def test_a_rank_that_raises_ends_the_other_in_seconds(strategy: str, fault: str, tmp_path: Path) -> None:
    """One rank raises; the other one waits in a collective of NCCL, and ends too."""
    done = run_ranks("tests.gpu.scripts.faults", 2, strategy, fault, tmp_path, expected_rc=None, timeout=100)
    assert (tmp_path / "raised").exists(), done.stderr
    elapsed_s = time.time() - float((tmp_path / "raised").read_text())
    assert elapsed_s < 30
    assert ("RankDisagreementError" if fault == "setup" else "out of cheese") in done.stderr
    assert not list(tmp_path.glob("trained-*"))
