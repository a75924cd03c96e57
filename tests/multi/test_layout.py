"""The arithmetic of a layout equals what DTensor and FSDP2 hold, on 1, 2 and 4 ranks; verification notices a fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks

SCRIPT = Path(__file__).parent / "scripts" / "layout.py"


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_layout_says_what_every_rank_holds(num_ranks: int) -> None:
    done = fork_ranks(SCRIPT, num_ranks, "held", timeout=240)
    assert done.stdout.count(": held as said") == num_ranks


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_runtime_shows_the_layout_of_a_model_under_each_strategy(num_ranks: int) -> None:
    done = fork_ranks(SCRIPT, num_ranks, "runtime", timeout=240)
    assert done.stdout.count(": shown") == num_ranks


def test_a_fault_in_placing_is_found_by_verification_and_the_other_way_round() -> None:
    done = fork_ranks(SCRIPT, 2, "faults", timeout=240)
    assert done.stdout.count(": placing was wrong") == 2
    assert done.stdout.count(": verifying was wrong") == 2
    assert done.stdout.count(": both right") == 2


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_parameters_that_are_frozen_and_unfrozen_train_as_in_one_process(num_ranks: int) -> None:
    done = fork_ranks(SCRIPT, num_ranks, "changes", timeout=240)
    assert done.stdout.count(": followed") == num_ranks


def test_fsdp_over_a_fused_weight_is_made_saved_and_loaded_right(tmp_path: Path) -> None:
    done = fork_ranks(SCRIPT, 4, "fused", tmp_path, timeout=240)
    assert done.stdout.count(": fused") == 4
