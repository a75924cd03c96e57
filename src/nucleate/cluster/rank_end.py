"""The ends of ranks: each rank writes a file when it ends or fails, and the supervisor finds the first failure."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

#: The file whose maker is the first rank that failed.
_FIRST = "first"
#: The number of characters of a message that tells about a consequence. Those of gloo are longer than they say.
_SHOWN = 150


@dataclass(frozen=True, slots=True)
class RankEnd:
    """The end of one rank, in the rank's own words.

    Attributes:
        rank: The rank.
        time_ns: The moment, on a clock that all processes of a machine share.
        code: The exit code, or None if the rank did not know it yet.
        traceback: The traceback of the exception that ended the rank, or `""`.
        is_first: Whether this rank failed before all others.
    """

    rank: int
    time_ns: int
    code: int | None = None
    traceback: str = ""
    is_first: bool = False

    @classmethod
    def write(cls, folder: Path, rank: int, code: int | None = None, traceback: str = "") -> Self:
        """Write the end of a rank, unless it has written one before, and return it.

        Args:
            folder: The folder of the run.
            rank: The rank.
            code: See the class. An end with another code than 0 is a failure.
            traceback: See the class.
        """
        moment = time.monotonic_ns()
        is_first = bool(code) and _is_made(folder / _FIRST)
        end = cls(rank, moment, code, traceback, is_first)
        path = folder / f"{rank}.end"
        if not path.exists():
            part = path.with_suffix(".part")
            part.write_text(json.dumps(asdict(end)), encoding="utf-8")
            part.replace(path)
        return end

    @classmethod
    def read(cls, folder: Path) -> dict[int, Self]:
        """Return the ends that the ranks have written, by rank."""
        ends = (cls(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.end"))
        return {end.rank: end for end in ends}

    @staticmethod
    def has_failure(folder: Path) -> bool:
        """Return whether a rank has written that it failed."""
        return (folder / _FIRST).exists()


@dataclass(frozen=True, slots=True)
class Failure:
    """The failure that ended a run: that of the first rank.

    Attributes:
        rank: The rank that failed first.
        world_size: The number of ranks.
        code: Its exit code, negative for a signal.
        traceback: Its traceback, or `""`.
    """

    rank: int
    world_size: int
    code: int
    traceback: str = ""

    @property
    def exit_code(self) -> int:
        """The exit code as shells count it: 128 and the number of the signal that killed the rank."""
        return 128 - self.code if self.code < 0 else self.code

    @property
    def in_short(self) -> str:
        """One sentence about the failure, without the traceback."""
        if not self.traceback:
            return str(self).partition(" It left")[0]
        return f"rank {self.rank} of {self.world_size} failed first: {self.traceback.rstrip().splitlines()[-1]}."

    def __str__(self) -> str:
        who = f"rank {self.rank} of {self.world_size}"
        if self.traceback:
            return f"{who} failed first:\n\n{self.traceback.rstrip()}"
        if self.code < 0:
            return f"{who} was killed first, by {_signal_name(-self.code)}. It left no traceback."
        return f"{who} ended first, with the exit code {self.code}. It left no traceback."


def first_failure(
    codes: Mapping[int, int], ends: Mapping[int, RankEnd], world_size: int, kill_after_s: float
) -> Failure:
    """Return the failure that ended a run.

    A rank that is killed, or that ends, makes collectives of the other ranks fail. Their tracebacks are consequences.

    Args:
        codes: The exit codes of ranks that failed, in the order in which they were noticed. They include ranks that
            were ended because of the first failure.
        ends: The ends that ranks have written.
        world_size: The number of ranks.
        kill_after_s: The time after which a rank that does not end is killed.
    """
    failed = {rank: codes.get(rank, end.code or 0) for rank, end in ends.items() if rank in codes or end.code}
    failed |= {rank: code for rank, code in codes.items() if rank not in failed}
    known = [end.time_ns for rank, end in ends.items() if rank in failed]
    is_patient = not known or time.monotonic_ns() - min(known) < kill_after_s * 1e9
    crashed = [rank for rank in codes if rank not in ends and _is_crash(codes[rank])]
    if crashed and (is_patient or next(iter(codes)) == crashed[0]):
        rank = crashed[0]
    else:
        rank = min(failed, key=lambda rank: ends[rank].time_ns if rank in ends else float("inf"))
    end = ends.get(rank)
    code = end.code if end is not None and end.code else failed[rank]
    return Failure(rank, world_size, code or 1, "" if end is None else end.traceback)


def consequence(rank: int, error: BaseException, ends: Iterable[RankEnd]) -> str:
    """Return the line about a rank that failed after another one."""
    first = next((f"rank {end.rank}" for end in ends if end.is_first), "another rank")
    reason = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {reason[0][:_SHOWN]}" if reason else type(error).__name__
    return f"rank {rank} ended after {first} had failed: {text}"


def _is_crash(code: int) -> bool:
    """Return whether a signal killed a rank that no supervisor sends first."""
    return code < 0 and code not in (-signal.SIGTERM, -signal.SIGINT)


def _is_made(path: Path) -> bool:
    """Make a file, and return False if it was there already."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:
        return f"signal {number}"
