"""Two ranks, which Lightning or torchrun starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from started import run


@pytest.mark.parametrize(
    ("where", "torchrun"), [pytest.param("init", False, marks=pytest.mark.long), ("configure_model", True)]
)
def test_a_deferred_model_trains_with_ddp_as_an_eager_one_does(where: str, torchrun: bool, tmp_path: Path) -> None:
    output = run("fit.py", "ddp", where, tmp_path, torchrun=torchrun)
    assert "rank 0: kept" in output
    assert "rank 1: kept" in output


def test_each_rank_makes_the_shards_that_configure_model_gives_it(tmp_path: Path) -> None:
    output = run("shard.py", tmp_path, torchrun=True)
    assert "rank 0: kept" in output
    assert "rank 1: kept" in output


@pytest.mark.parametrize(
    ("strategy", "where"), [("ddp_fork", "init"), pytest.param("ddp_spawn", "configure_model", marks=pytest.mark.long)]
)
def test_processes_that_lightning_forks_or_spawns_train_it_too(strategy: str, where: str) -> None:
    output = run("processes.py", strategy, where, torchrun=False)
    assert [output.count(f"{who}: kept") for who in ("rank 0", "rank 1", "after")] == [2, 2, 1]
