"""The first failure of a run: which rank it was, its exit code and its traceback, whatever happened to the others."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nucleate.cluster.rank_end import Failure, RankEnd, consequence, first_failure

NOW = time.monotonic_ns()


def first(codes: dict[int, int], *ends: RankEnd) -> Failure:
    # A day: `NOW` is the time at which this file was imported.
    return first_failure(codes, {end.rank: end for end in ends}, 3, kill_after_s=86400)


def test_the_earliest_of_the_ranks_that_failed_is_the_first() -> None:
    ends = [RankEnd(0, NOW, None), RankEnd(1, NOW + 2, 1, "late"), RankEnd(2, NOW + 1, 1, "early")]
    assert first({1: 1, 2: 1}, *ends) == Failure(2, 3, 1, "early")
    # Rank 2 was ended by the agent before it had ended by itself.
    assert first({1: 1, 2: -15}, *ends) == Failure(2, 3, 1, "early")


def test_a_rank_that_leaves_makes_others_fail() -> None:
    assert first({0: 1, 1: 3}, RankEnd(0, NOW + 1, 1, "peer is gone"), RankEnd(1, NOW)) == Failure(1, 3, 3)


def test_a_rank_that_was_killed_makes_others_fail() -> None:
    assert first({0: 1, 2: -9}, RankEnd(0, NOW, 1, "peer is gone")) == Failure(2, 3, -9)
    assert first({2: -11}) == Failure(2, 3, -11)


def test_a_rank_that_was_killed_because_it_did_not_end_is_not_the_first() -> None:
    end = RankEnd(1, NOW - 10**9, 1, "boom")
    assert first_failure({1: 1, 0: -9}, {1: end}, 2, kill_after_s=0.5) == Failure(1, 2, 1, "boom")


def test_a_rank_that_was_told_to_end_fails_by_the_signal() -> None:
    assert first({1: -15}) == Failure(1, 3, -15)
    assert first({1: -15}).exit_code == 143


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (Failure(1, 2, 1, "Traceback: boom\n"), "rank 1 of 2 failed first:\n\nTraceback: boom"),
        (Failure(0, 2, -9), "rank 0 of 2 was killed first, by SIGKILL (signal 9). It left no traceback."),
        (Failure(0, 2, 3), "rank 0 of 2 ended first, with the exit code 3. It left no traceback."),
    ],
)
def test_a_failure_says_what_happened_and_ends_with_the_traceback(failure: Failure, text: str) -> None:
    assert str(failure) == text


def test_ends_are_written_once_and_the_first_failure_is_marked(tmp_path: Path) -> None:
    assert not RankEnd.write(tmp_path, 2).is_first
    assert RankEnd.write(tmp_path, 1, 1, "boom").is_first
    assert not RankEnd.write(tmp_path, 0, 1, "peer is gone").is_first
    RankEnd.write(tmp_path, 1, 1, "again")
    ends = RankEnd.read(tmp_path)
    assert {rank: (end.code, end.traceback, end.is_first) for rank, end in ends.items()} == {
        0: (1, "peer is gone", False),
        1: (1, "boom", True),
        2: (None, "", False),
    }
    assert ends[2].time_ns < ends[1].time_ns < ends[0].time_ns
    told = consequence(0, OSError("peer\nis gone"), ends.values())
    assert told == "rank 0 ended after rank 1 had failed: OSError: peer"
