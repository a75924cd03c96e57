"""Dimensions on one mesh: eager's bits, eager's training, and errors on all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks

SCRIPTS = Path(__file__).parent / "scripts"
SHORT = [(2, "tp", "tied,dropout"), (4, "tp x fsdp", "tied"), (4, "tp x replicate", "untied")]
LONG = [
    (2, "tp", "untied"),
    (4, "tp", "tied,untied,dropout"),
    (4, "tp x fsdp", "untied"),
    (4, "tp x replicate", "tied"),
    (4, "hsdp,replicate", "tied,untied"),
    (4, "recomputed,compiled", "tied,untied"),
    (8, "hsdp x tp", "tied"),
]


@pytest.mark.parametrize(
    ("num_ranks", "meshes", "models"), [*SHORT, *(pytest.param(*cell, marks=pytest.mark.long) for cell in LONG)]
)
def test_a_model_starts_and_trains_as_the_plain_one(num_ranks: int, meshes: str, models: str) -> None:
    done = fork_ranks(SCRIPTS / "dimensions.py", num_ranks, meshes, models, timeout=400)
    cells = len(meshes.split(",")) * len(models.split(","))
    assert done.stdout.count(": right") == cells * num_ranks


def test_plans_that_do_not_fit_are_refused_on_all_ranks_and_functions_lay_out() -> None:
    assert fork_ranks(SCRIPTS / "dimension_uses.py", 4).stdout.count("done") == 4
