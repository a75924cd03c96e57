"""Lazy modules on several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_lazy_module_is_refused_on_every_rank_and_works_after_a_dry_run(strategy: str) -> None:
    done = fork_ranks(Path(__file__).parent / "scripts" / "lazy_modules.py", 2, strategy)
    assert done.stdout.count("holds") == 3
