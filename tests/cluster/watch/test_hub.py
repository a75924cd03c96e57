"""The hub on rank 0: it asks only while a rank waits, looks twice, and lets one rank print one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nucleate.cluster.watch import hub as hub_module
from nucleate.cluster.watch.hub import Hub
from nucleate.cluster.watch.position import Position


class Job:
    """Ranks at given positions, which answer at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *positions: Position) -> None:
        self.positions = list(positions)
        self.sent: list[tuple[int, dict[str, Any]]] = []
        self.now = 0.0
        self.asked: list[int] = []
        monkeypatch.setattr(hub_module.time, "monotonic", lambda: self.now)
        self.hub = Hub(len(positions), self.send)

    def send(self, rank: int, message: dict[str, Any]) -> None:
        self.asked.append(rank) if "where" in message else self.sent.append((rank, message))

    def say(self, rank: int, **words: object) -> None:
        self.hub.receive(rank, {"position": self.positions[rank].written(), **words})

    def second(self, *waiting: int) -> None:
        """Let a second pass, in which ranks report that they wait."""
        self.now += 1.1
        for rank in waiting:
            self.say(rank, waits=True)
        self.hub.tick(self.now)
        while self.asked:
            self.say(self.asked.pop(0))

    def words(self, kind: str) -> list[tuple[int, str]]:
        return [(rank, str(message[kind])) for rank, message in self.sent if kind in message]


WAITS = Position(0, meetings=1, kind="meeting", name="save", seconds=2.0, line="train.py:7")
TRAINS = Position(1, exchanges=1, kind="exchange", name="backward", seconds=2.0, line="train.py:9")


def test_nobody_is_asked_while_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, replace(WAITS, kind=""), replace(TRAINS, kind=""))
    monkeypatch.setattr(job, "send", lambda *_: pytest.fail("asked"))
    for _ in range(5):
        job.second()


def test_all_ranks_get_the_verdict_after_a_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, WAITS, TRAINS)
    job.second(0)
    assert job.hub.verdict is None
    job.second(0)
    assert [rank for rank, _ in job.words("verdict")] == [0, 1]
    assert "train.py:7" in job.words("verdict")[0][1]


def test_a_case_that_resolves_itself_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, WAITS, TRAINS)
    job.second(0)
    job.positions[1] = replace(TRAINS, kind="")
    job.second(0)
    job.positions[1] = replace(TRAINS, exchanges=2)
    job.second(0)
    assert job.hub.verdict is None


def test_one_rank_says_once_that_it_waits_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(WAITS, seconds=31.0)
    job = Job(monkeypatch, here, replace(here, rank=1), Position(2, name="setup", seconds=40.0, line="train.py:1"))
    for _ in range(8):
        job.second(0, 1)
    ((rank, line),) = job.words("long")
    assert rank == 0
    assert line == (
        "rank 0 has been in save for 31 s at train.py:7, and goes on waiting. rank 1 has been in save for 31 s at "
        "train.py:7; rank 2 is at train.py:1; its last call was setup, 40 s ago."
    )


def test_a_failed_communication_is_explained_by_a_rank_that_died(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, WAITS, TRAINS)
    job.say(0, failed="Connection closed by peer")
    assert job.hub.lose(1).end == "died"
    job.second()
    assert "rank 1 has died" in job.words("verdict")[0][1]


def test_a_failed_communication_without_a_reason_gets_all_places(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, replace(WAITS, kind="uncounted"), replace(TRAINS, kind=""))
    job.say(0, failed="timed out")
    for _ in range(3):
        job.second()
    ((rank, places),) = job.words("unexplained")
    assert rank == 0
    assert "rank 1 is at train.py:9" in places
    assert job.hub.verdict is None
