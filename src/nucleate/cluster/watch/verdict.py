"""The verdict about ranks that wait: it is certain that one of them waits for a call that will not come.

Only certain cases are judged. A rank that computes for long, or sleeps, may still come.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

from nucleate.cluster.watch.calls import EXCHANGE, MEETING, UNCOUNTED
from nucleate.cluster.watch.position import DIED, ENDED, SILENT, Position

#: The time after which a rank in a call may wait for others. Shorter calls are not judged.
WAITS_S = 1.0
#: The time for which a rank must be in an exchange before a rank that died is the reason. A connection of gloo that
#: breaks wakes it at once. It may also compute, and the other rank may have ended by `os._exit` after its last step.
_EXCHANGE_S = 10.0
_ADVICE = "Every rank must make the same calls, in the same order, and the same number of steps."


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict that ends the communication of all ranks.

    Attributes:
        is_disagreement: Whether the ranks made different calls. Otherwise a rank has ended or died.
        text: The message of the error that every rank raises.
        key: The facts on which the verdict stands. If they are the same a moment later, it is certain.
    """

    is_disagreement: bool
    text: str
    key: str


def judge(positions: Iterable[Position]) -> Verdict | None:
    """Return the verdict, or None if no rank waits in vain for certain.

    Args:
        positions: The positions of all ranks that are known, by rank.
    """
    known = list(positions)
    waiting = [one for one in known if not one.end and one.kind not in ("", UNCOUNTED) and one.seconds >= WAITS_S]
    for one in waiting:
        for other in known:
            if other.end and _needs(one, other):
                return _about_end(one, other, known)
    for one, other in permutations(waiting, 2):
        if _waits_crosswise(one, other):
            return _about_calls(one, other, known)
    return None


def explained(known: Iterable[Position], rank: int, reason: str) -> Verdict | None:
    """Return the verdict about a rank whose communication has failed, if a rank that is gone explains it.

    Args:
        known: The positions of all ranks.
        rank: The rank.
        reason: The error of the communication.
    """
    known = list(known)
    own = next((one for one in known if one.rank == rank), Position(rank))
    gone = [one for one in known if one.end]
    # A rank that raised is the reason rather than one that ended after it.
    gone.sort(key=lambda one: (not one.reason, one.end != DIED))
    return _about_end(own, gone[0], known) if gone else None


def table(positions: Iterable[Position]) -> str:
    """Return one line for each position."""
    return "\n".join(f"  {position}" for position in positions)


def _needs(one: Position, other: Position) -> bool:
    """Return whether a rank needs another one, which has ended, in the call that it is in."""
    if other.end == SILENT:
        # Nothing will wake the rank: a connection of gloo waits for as long as the strategy's timeout.
        return True
    if other.end == DIED:
        return one.seconds >= (2 * WAITS_S if one.kind == MEETING else _EXCHANGE_S)
    if one.kind == MEETING:
        return one.meetings > other.meetings
    return (one.meetings, one.exchanges) > (other.meetings, other.exchanges)


def _waits_crosswise(one: Position, other: Position) -> bool:
    """Return whether a rank waits for another one, which is in another call of the same number."""
    if one.kind == MEETING and not one.has_met and other.kind == EXCHANGE:
        # The other one needs this rank for an exchange that it has never entered.
        return one.meetings == other.meetings + 1 and other.exchanges > one.exchanges
    if one.kind == other.kind == MEETING:
        # Barriers of different names meet.
        names = {each.name.partition("(")[0] for each in (one, other)}
        return one.meetings == other.meetings and len(names) == 2 and not (one.has_met or other.has_met)
    same = (one.meetings, one.exchanges) == (other.meetings, other.exchanges)
    return one.kind == other.kind == EXCHANGE and same and one.name != other.name


def _about_end(one: Position, gone: Position, known: list[Position]) -> Verdict:
    if gone.end == SILENT:
        how = f"rank {gone.rank} does not answer any more: its machine, or the network, is gone."
    elif gone.end == DIED:
        how = (
            f"rank {gone.rank} has died: its process is gone, and left no exception. It was killed, or it called "
            "os._exit."
        )
    elif gone.reason:
        how = f"rank {gone.rank} has ended by {gone.reason}."
    else:
        how = f"rank {gone.rank} has ended its script."
    advice = f" {_ADVICE}" if gone.end == ENDED and not gone.reason else ""
    text = f"{how} Rank {one.rank} needs it in {one.name}.{advice}\n{table(known)}"
    return Verdict(False, text, f"{one.rank} {one.meetings} {one.exchanges} {one.kind} {gone.rank}")


def _about_calls(one: Position, other: Position, known: list[Position]) -> Verdict:
    text = (
        f"rank {one.rank} is in {one.name} and rank {other.rank} is in {other.name}, so each waits for the other. "
        f"{_ADVICE}\n{table(known)}"
    )
    counts = [f"{each.rank} {each.meetings} {each.exchanges} {each.name}" for each in (one, other)]
    return Verdict(True, text, " ".join(counts))
