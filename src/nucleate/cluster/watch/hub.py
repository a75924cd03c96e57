"""The place on rank 0 where the positions of all ranks meet while a rank waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from nucleate.cluster.watch.calls import UNCOUNTED
from nucleate.cluster.watch.link import Message
from nucleate.cluster.watch.position import DIED, SILENT, Position
from nucleate.cluster.watch.verdict import WAITS_S, Verdict, explained, judge, table

#: A rank that waits longer says so once, and goes on waiting.
LONG_S = 30.0
#: The time for which a round waits for the positions of all ranks. A rank in C++ that holds Python's lock is late.
_ROUND_S = 2.0
#: The time between two rounds while nothing changes: at first, and when ranks have waited for long.
_PAUSE_S, _LONG_PAUSE_S = 1.0, 5.0
#: A rank whose communication failed waits so long for the news about the reason.
_NEWS_S = 1.5


class Hub:
    """The collector of positions. One thread calls all methods.

    Args:
        world_size: The number of ranks.
        send: Sends a message to a rank.
    """

    def __init__(self, world_size: int, send: Callable[[int, Message], object]) -> None:
        self._world_size = world_size
        self._send = send
        self._positions: dict[int, Position] = {}
        self._ends: dict[int, Position] = {}
        self._waiting: dict[int, float] = {}
        # The ranks whose communication failed: the error, and the moment at which they get an answer.
        self._failed: dict[int, tuple[str, float]] = {}
        self._round_began: float | None = None
        self._round_ended = 0.0
        self._suspected = ""
        self._told: set[tuple[int, int]] = set()
        self.verdict: Verdict | None = None

    def receive(self, rank: int, message: Message) -> None:
        """Take a message of a rank.

        Args:
            rank: The rank.
            message: It has the rank's `position`, and says what the rank wants: `waits`, `failed`, `ended` or nothing.
        """
        now = time.monotonic()
        position = Position.read(message["position"])
        self._positions[rank] = position
        if "ended" in message:
            self._ends[rank] = position
        elif "failed" in message:
            self._failed[rank] = (message["failed"], now + _NEWS_S)
            self._begin_round(now)
        elif "waits" in message:
            self._waiting[rank] = now
        self.tick(now)

    def lose(self, rank: int, is_silent: bool = False) -> Position:
        """Take the news that the connection to a rank is gone, and return the end of the rank.

        Args:
            rank: The rank.
            is_silent: Whether its machine does not answer any more.
        """
        if rank not in self._ends:
            last = self._positions.get(rank, Position(rank))
            # The rank has sent its position only when it was asked, so it may have gone on since then.
            end = SILENT if is_silent else DIED
            self._ends[rank] = replace(last, end=end, kind="", name="", line="", reason="")
            # Ranks that wait need no further pause.
            self._round_ended = 0.0
        return self._ends[rank]

    def tick(self, now: float) -> None:
        """Begin or end a round, and answer."""
        self._waiting = {rank: at for rank, at in self._waiting.items() if now - at < 3 * WAITS_S + _LONG_PAUSE_S}
        if self._round_began is not None:
            missing = set(range(self._world_size)) - set(self._positions) - set(self._ends)
            if not missing or now - self._round_began > _ROUND_S:
                self._round_began, self._round_ended = None, now
                self._judge(now)
        elif (self._waiting or self._failed) and now - self._round_ended > self._pause():
            self._begin_round(now)
        self._answer_failed(now)

    def known(self) -> list[Position]:
        """Return the last positions of all ranks that are known."""
        known = {**self._positions, **self._ends}
        return [known[rank] for rank in sorted(known)]

    def _pause(self) -> float:
        waiting = [one for one in self.known() if one.kind and not one.end]
        long = bool(waiting) and (waiting[0].meetings, waiting[0].exchanges) in self._told
        return _LONG_PAUSE_S if long and not self._suspected and not self._failed else _PAUSE_S

    def _begin_round(self, now: float) -> None:
        self._round_began = now
        self._positions = {}
        for rank in range(self._world_size):
            if rank not in self._ends:
                self._send(rank, {"where": True})

    def _judge(self, now: float) -> None:
        found = judge(self.known())
        if found is None:
            self._suspected = ""
            self._tell_long()
        elif found.key == self._suspected or not found.is_disagreement:
            # The positions of one round are not of one moment, but an end is final.
            self.spread(found)
        else:
            self._suspected = found.key

    def spread(self, verdict: Verdict) -> None:
        """Send the verdict to all ranks, once."""
        if self.verdict is not None:
            return
        self.verdict = verdict
        message = {"verdict": [verdict.is_disagreement, verdict.text, verdict.key]}
        for rank in range(self._world_size):
            if rank not in self._ends:
                self._send(rank, message)

    def _answer_failed(self, now: float) -> None:
        for rank, (reason, until) in list(self._failed.items()):
            found = explained(self.known(), rank, reason)
            if found is not None and (now >= until - _NEWS_S / 2 or len(self.known()) == self._world_size):
                self.spread(found)
            elif now < until or self._round_began is not None:
                continue
            else:
                self._send(rank, {"unexplained": table(self.known())})
            del self._failed[rank]

    def _tell_long(self) -> None:
        """Let the first rank that has waited for long print where all ranks are, once for each call."""
        waiting = [one for one in self.known() if one.kind and not one.end and one.seconds >= LONG_S]
        if not waiting:
            return
        first = waiting[0]
        call = (first.meetings, first.exchanges)
        if call in self._told or first.kind == UNCOUNTED:
            return
        self._told.add(call)
        others = [one for one in self.known() if one is not first]
        self._send(first.rank, {"long": _summary(first, others)})


def _summary(first: Position, others: list[Position]) -> str:
    """Return one line about a rank that waits and about the others; ranks at the same place are named together."""
    places: dict[tuple[str, str, str], list[Position]] = {}
    for one in others:
        places.setdefault((one.kind, one.name, one.line), []).append(one)
    shown = []
    for group in list(places.values())[:8]:
        also = f" (and {len(group) - 1} ranks at the same place)" if len(group) > 1 else ""
        shown.append(f"{group[0]}{also}")
    return f"{first}, and goes on waiting. {'; '.join(shown)}."
