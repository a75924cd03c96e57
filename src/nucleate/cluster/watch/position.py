"""The position of a rank: its place in its calls, and the line of the user's file, as other ranks get to know it."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
import time
from dataclasses import asdict, dataclass
from functools import cache
from types import FrameType
from typing import Any, Self

from nucleate.cluster.watch.calls import Calls

#: How a rank has ended: with a word, without one, or with its machine.
ENDED = "ended"
DIED = "died"
SILENT = "fallen silent"


@dataclass(frozen=True, slots=True)
class Position:
    """The position of a rank.

    Attributes:
        rank: The rank.
        meetings: The number of meetings that it has entered.
        exchanges: The number of exchanges that it has entered since its last meeting.
        kind: The kind of the call that it is in, or `""`.
        name: The name of that call, or of the last one.
        has_met: Whether all ranks have entered the meeting that it is in.
        seconds: The time since it entered or left that call.
        line: The file and the line of the user's code, or `""`.
        end: How the rank has ended: `""` while it runs, else one of the words above.
        reason: The exception that ended it, or `""`.
    """

    rank: int
    meetings: int = 0
    exchanges: int = 0
    kind: str = ""
    name: str = ""
    has_met: bool = False
    seconds: float = 0.0
    line: str = ""
    end: str = ""
    reason: str = ""

    @classmethod
    def of(cls, rank: int, calls: Calls, end: str = "", reason: str = "") -> Self:
        """Return the position of this process.

        Args:
            rank: Its rank.
            calls: Its calls.
            end: See the class.
            reason: See the class.
        """
        state = calls.state
        seconds = time.monotonic() - state.since
        line = "" if end else user_line(calls.thread if state.kind else threading.main_thread().ident)
        return cls(rank, *state[:5], seconds, line, end, reason)

    @classmethod
    def read(cls, fields: dict[str, Any]) -> Self:
        """Return the position that a message holds."""
        return cls(**fields)

    def written(self) -> dict[str, Any]:
        """Return the position for a message."""
        return asdict(self)

    def __str__(self) -> str:
        if self.end:
            after = f" after {self.name}" if self.name else ""
            how = f" by {self.reason}" if self.reason else ""
            return f"rank {self.rank} has {self.end}{how}{after}"
        where = f" at {self.line}" if self.line else ""
        if self.kind:
            return f"rank {self.rank} has been in {self.name} for {self.seconds:.0f} s{where}"
        last = f"its last call was {self.name}, {self.seconds:.0f} s ago" if self.name else "it has made no call yet"
        return f"rank {self.rank} is{where or ' outside of nucleate'}; {last}"


def user_line(thread: int | None) -> str:
    """Return the line of the user's code that a thread of this process runs, as `path:line`, or `""`.

    Args:
        thread: The thread.
    """
    frame = sys._current_frames().get(thread or 0)
    innermost = frame
    while frame is not None and not _is_users(frame):
        frame = frame.f_back
    frame = frame or innermost
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _is_users(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    return not path.startswith("<") and not path.startswith(_others())


@cache
def _others() -> tuple[str, ...]:
    """Return the folders of code that the user did not write."""
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    paths = sysconfig.get_paths()
    return tuple({here + os.sep, *(paths[name] + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib"))})
