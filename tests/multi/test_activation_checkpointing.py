"""Activation checkpointing on 2 ranks, under every strategy."""

from __future__ import annotations

from pathlib import Path

from tests.multi.ranks import fork_ranks


def test_gradients_on_ranks_have_the_bits_that_they_have_without_checkpointing() -> None:
    done = fork_ranks(Path(__file__).parent / "scripts" / "activation_checkpointing.py", 2)
    assert done.stdout.count("all bits are the same") == 2
