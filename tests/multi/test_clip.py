"""Clipping on several ranks: the norm is equal on all of them, whatever the layout of the gradients is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gradients_of_every_layout_are_clipped_as_those_of_a_whole_model(num_ranks: int) -> None:
    done = fork_ranks(Path(__file__).parent / "scripts" / "clip.py", num_ranks)
    assert done.stdout.count("gradients of every layout are clipped") == num_ranks
