"""torchrec's collections and models on 2 ranks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torchrec", "fbgemm_gpu")),
    reason="torchrec is not installed",
)
def test_recommenders_are_exact_and_train_on_two_ranks() -> None:
    done = fork_ranks(Path(__file__).parent / "scripts" / "recommenders.py", 2)
    assert done.stdout.count("recommenders are exact") == 2
