"""Optimizers under FSDP: they step as in one process and resume, or are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks

SCRIPT = Path(__file__).parent / "scripts" / "optimizers.py"


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.long)])
def test_every_optimizer_of_torch_steps_as_in_one_process_or_is_refused(tmp_path: Path, nproc: int) -> None:
    done = fork_ranks(SCRIPT, nproc, "train", tmp_path, timeout=280)
    assert done.stdout.count("all optimizers hold") == nproc


@pytest.mark.long
def test_every_optimizer_steps_as_in_one_process_with_replicas_of_shards(tmp_path: Path) -> None:
    done = fork_ranks(SCRIPT, 4, "hsdp", tmp_path, timeout=280)
    assert done.stdout.count("all optimizers hold") == 4


def test_every_optimizer_resumes_on_two_ranks_and_on_one(tmp_path: Path) -> None:
    assert fork_ranks(SCRIPT, 2, "save", tmp_path, timeout=280).stdout.count("all optimizers hold") == 2
    for strategy in ("single_device", "fsdp"):
        assert fork_ranks(SCRIPT, 1, strategy, tmp_path).stdout.count("all optimizers hold") == 1
