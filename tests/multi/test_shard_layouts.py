"""Shards of any dimension, uneven ones and shards of shards are eager's, and made alone where they can be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks

SCRIPT = Path(__file__).parent / "scripts" / "shard_layouts.py"
LAYOUTS = ["rows", "long columns", "short columns", "uneven columns", "every third row"]


@pytest.mark.parametrize(("num_ranks", "layouts"), [(2, LAYOUTS), (4, [*LAYOUTS, "tensor parallel and rows"])])
def test_every_layout_of_shards_gets_the_values_of_eager_construction(num_ranks: int, layouts: list[str]) -> None:
    done = fork_ranks(SCRIPT, num_ranks, *layouts, timeout=180)
    for layout in layouts:
        assert done.stdout.count(f": {layout} exact") == num_ranks
