"""Two processes with a device each, started by torchrun: NCCL on CUDA."""

from __future__ import annotations

import functools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.gpu.scripts.ranks import CHECKS, STRATEGIES
from tests.multi.ranks import run_ranks

pytestmark = [pytest.mark.cuda, pytest.mark.two_gpus]
SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True)
class Outcome:
    """How far a run of `scripts/ranks.py` came.

    Attributes:
        passed: The checks that have held on all ranks.
        failure: What the run said if it failed, else an empty text.
    """

    passed: frozenset[str]
    failure: str


@functools.cache
def outcome(strategy: str) -> Outcome:
    """Run all checks of a strategy in one launch, the first time that it is asked for."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        failure = ""
        try:
            run_ranks("tests.gpu.scripts.ranks", 2, strategy, folder, timeout=150)
        except AssertionError as error:
            said = [path.read_text() for path in sorted(folder.glob("failed-*"))]
            failure = "\n".join(said) or str(error)
        passed = (folder / "passed").read_text().split() if (folder / "passed").exists() else []
    return Outcome(frozenset(passed), failure)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_holds_on_two_devices(strategy: str, check: str) -> None:
    """Weights, training, clipping, accumulation, files, checkpoints, generators and memory on two GPUs."""
    found = outcome(strategy)
    assert check in found.passed, found.failure or "the run ended without this check"


@pytest.mark.parametrize("name", ["TestDDP", "TestFSDP"])
def test_a_strategy_passes_its_suite_on_two_devices(name: str) -> None:
    """The strategy suite that plugins inherit, one pytest for each of two GPUs."""
    # -x, because a rank that fails a test and goes on leaves the others waiting for it in the last one.
    done = run_ranks("pytest", 2, "-x", "-q", f"tests/gpu/test_conformance.py::{name}", timeout=200)
    assert done.stdout.count(" passed") == 2


@pytest.mark.parametrize("fault", ["constructor", "setup", "training"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_raises_ends_the_other_in_seconds(strategy: str, fault: str, tmp_path: Path) -> None:
    """One rank raises; the other one waits in a collective of NCCL, and ends too."""
    done = run_ranks("tests.gpu.scripts.faults", 2, strategy, fault, tmp_path, expected_rc=None, timeout=100)
    elapsed_s = time.time() - float((tmp_path / "raised").read_text())
    assert elapsed_s < 30
    assert ("RankDisagreementError" if fault == "setup" else "out of cheese") in done.stderr
    assert not list(tmp_path.glob("trained-*"))
