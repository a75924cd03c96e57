"""A verdict names a rank that waits in vain for certain. A rank that may only be slow gets none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nucleate.cluster.watch.position import Position
from nucleate.cluster.watch.verdict import explained, judge

#: Ranks after their second meeting and three exchanges.
USER = Position(0, meetings=2, exchanges=3, name="backward", seconds=5.0, line="train.py:3")


def rank(number: int, **changes: object) -> Position:
    return replace(USER, rank=number, **changes)  # type: ignore[arg-type]


def meeting(number: int, name: str = "barrier", **changes: object) -> Position:
    return rank(number, **{"meetings": 3, "kind": "meeting", "name": name, **changes})


def exchange(number: int, name: str = "backward", **changes: object) -> Position:
    return rank(number, **{"exchanges": 4, "kind": "exchange", "name": name, **changes})


@pytest.mark.parametrize(
    "positions",
    [
        # A rank computes, sleeps, or has not come yet.
        (meeting(0), rank(1)),
        (exchange(0), rank(1)),
        # Both are where they should be, however long it takes.
        (meeting(0, seconds=500.0), meeting(1, seconds=500.0)),
        (meeting(0, "barrier('a')"), meeting(1, "barrier('b')")),
        (exchange(0, seconds=500.0), exchange(1, seconds=500.0)),
        # The meeting has begun: rank 0 writes a file, and rank 1 trains already.
        (meeting(0, "save", has_met=True), exchange(1, meetings=3, exchanges=1)),
        # Rank 1 is behind, and may come.
        (meeting(0), exchange(1, exchanges=3)),
        (exchange(0, exchanges=6, name="forward"), exchange(1, exchanges=5)),
        # Nobody has waited for long.
        (meeting(0, seconds=0.5), exchange(1, seconds=0.5)),
        # Ranks of a group may be the only ones that make the call.
        (rank(0, kind="uncounted", name="all_reduce"), exchange(1)),
        # Rank 1 has ended after its last call, whose end rank 0 has not seen yet.
        (exchange(0), rank(1, exchanges=4, end="ended")),
        (meeting(0, has_met=True), rank(1, meetings=3, end="ended")),
        # Rank 1 may have left by `os._exit` after its last step, while rank 0 computes.
        (exchange(0), rank(1, end="died")),
        (rank(0), rank(1, end="died")),
    ],
)
def test_a_rank_that_may_come_is_no_reason(positions: tuple[Position, ...]) -> None:
    assert judge(positions) is None


@pytest.mark.parametrize(
    ("positions", "disagree", "words"),
    [
        ((meeting(0, "save"), meeting(1)), True, "rank 0 is in save and rank 1 is in barrier, so each waits for the"),
        ((meeting(0, "save"), exchange(1)), True, "rank 0 is in save and rank 1 is in backward"),
        ((exchange(0, "forward"), exchange(1)), True, "rank 0 is in forward and rank 1 is in backward"),
        ((exchange(0), rank(1, end="ended")), False, "rank 1 has ended its script. Rank 0 needs it in backward."),
        ((meeting(0), rank(1, end="ended")), False, "rank 1 has ended its script. Rank 0 needs it in barrier."),
        (
            (meeting(0), rank(1, end="ended", reason="ValueError: no")),
            False,
            "rank 1 has ended by ValueError: no. Rank 0 needs it in barrier.\n",
        ),
        ((meeting(0), rank(1, end="died")), False, "rank 1 has died: its process is gone, and left no exception."),
        ((exchange(0, seconds=20.0), rank(1, end="died")), False, "rank 1 has died"),
        ((exchange(0), rank(1, end="fallen silent")), False, "rank 1 does not answer any more: its machine, or the"),
    ],
)
def test_a_rank_that_cannot_come_is_named(positions: tuple[Position, ...], disagree: bool, words: str) -> None:
    verdict = judge(positions)
    assert verdict is not None
    assert verdict.is_disagreement is disagree
    assert words in verdict.text
    # Every rank's place follows.
    assert [f"rank {one.rank}" in verdict.text.partition("\n")[2] for one in positions] == [True] * len(positions)


def test_the_exception_explains_a_failure_rather_than_an_end_that_followed() -> None:
    known = [exchange(0), rank(1, end="died"), rank(2, end="ended", reason="KeyError: 'a'")]
    verdict = explained(known, 0, "Connection closed by peer")
    assert verdict is not None
    assert verdict.text.startswith("rank 2 has ended by KeyError: 'a'. Rank 0 needs it in backward.")
    assert explained([exchange(0), exchange(1)], 0, "timed out") is None
