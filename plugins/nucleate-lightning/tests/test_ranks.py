"""Two ranks, which Lightning or torchrun starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from started import run


@pytest.mark.parametrize("torchrun", [False, True], ids=["lightning", "torchrun"])
@pytest.mark.parametrize("where", ["init", "configure_model"])
def test_a_deferred_model_trains_with_ddp_as_an_eager_one_does(where: str, torchrun: bool, tmp_path: Path) -> None:
    output = run("fit.py", "ddp", where, tmp_path, torchrun=torchrun)
    assert "rank 0: kept" in output
    assert "rank 1: kept" in output


@pytest.mark.parametrize("torchrun", [False, True], ids=["lightning", "torchrun"])
def test_each_rank_makes_the_shards_that_configure_model_gives_it(torchrun: bool, tmp_path: Path) -> None:
    output = run("shard.py", tmp_path, torchrun=torchrun)
    assert "rank 0: kept" in output
    assert "rank 1: kept" in output
