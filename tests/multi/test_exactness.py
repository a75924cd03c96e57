"""The promise: one seed, one set of weights, whatever the strategy and the number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multi.exactness import main
from tests.multi.ranks import fork_ranks

SCRIPT = Path(__file__).with_name("exactness.py")


@pytest.mark.usefixtures("factories_on_device")
def test_one_process_makes_what_eager_makes_and_trains_as_eager_trains() -> None:
    main("single")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_make_what_eager_makes_and_train_as_eager_trains(strategy: str) -> None:
    fork_ranks(SCRIPT, 2, strategy, "train", timeout=240)


@pytest.mark.parametrize(
    ("strategy", "num_ranks"),
    [
        pytest.param("fsdp", 4, marks=pytest.mark.long),
        ("hsdp", 4),
        pytest.param("fsdp-linear", 2, marks=pytest.mark.long),
    ],
)
def test_other_layouts_make_what_eager_makes(strategy: str, num_ranks: int) -> None:
    fork_ranks(SCRIPT, num_ranks, strategy, "weights", timeout=240)
