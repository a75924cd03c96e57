"""The calls of this process that need other ranks: which one it is in, and how many it has entered.

Calls are counted in memory, and forward, backward and step exchange nothing for it. A call is a meeting or an exchange:

- A **meeting**, such as `save` or `barrier`, begins when all ranks have entered it. Ranks that enter different meetings
  learn it at once.
- An **exchange**, such as `backward`, goes over to the strategy, whose collectives wait for the other ranks.

Counts of two ranks can be compared because every rank must enter the same calls in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from types import TracebackType
from typing import NamedTuple, Protocol

MEETING = "meeting"
EXCHANGE = "exchange"
#: A call on a group of some ranks, or without synchronization. Ranks may make different numbers of such calls.
UNCOUNTED = "uncounted"


class State(NamedTuple):
    """The place of this process in its calls. It is replaced as a whole, so that another thread reads a true one.

    Attributes:
        meetings: The number of meetings that this process has entered.
        exchanges: The number of exchanges that it has entered since the last meeting.
        kind: The kind of the call that it is in, or `""`.
        name: The name of that call, or of the last one.
        has_met: Whether all ranks have entered the meeting.
        since: When it entered or left the call, by `time.monotonic`.
    """

    meetings: int = 0
    exchanges: int = 0
    kind: str = ""
    name: str = ""
    has_met: bool = False
    since: float = 0.0


class Watch(Protocol):
    """The watch of this process, as calls need it."""

    def refuse(self) -> None:
        """Raise the error that ended the communication of this process, if there is one."""

    def meet(self, number: int, name: str) -> None:
        """Wait for all ranks at the beginning of a meeting."""

    def explain(self, error: Exception) -> Exception | None:
        """Return the error for a communication that failed, or None for an error of another kind."""


class Calls:
    """The calls of this process. Only the outermost call of a thread counts.

    Attributes:
        state: The place of this process.
        thread: The thread that is in a call, or was in the last one.
        watch: The watch of this process, or None if there is one process.
        waits_for: The prefix of the keys in the group's store for which this process waits, or `""`.
    """

    def __init__(self) -> None:
        self.state = State()
        self.thread = 0
        self.watch: Watch | None = None
        self.waits_for = ""
        self._is_inside = False

    def meeting(self, name: str) -> Call:
        """Return a context for a call that begins when every rank has entered it.

        Args:
            name: The name of the call, equal on all ranks. Words in parentheses at its end are shown only.
        """
        return Call(self, MEETING, name)

    def exchange(self, name: str, counts: bool = True) -> Call:
        """Return a context for a call in which a strategy exchanges tensors.

        Args:
            name: The name of the call.
            counts: Whether every rank makes this call.
        """
        return Call(self, EXCHANGE if counts else UNCOUNTED, name)

    def refuse(self) -> None:
        """Raise the error that ended the communication of this process, if there is one."""
        if self.watch is not None:
            self.watch.refuse()

    def explained(self, error: Exception, name: str) -> Exception | None:
        """Return the error for a communication that failed in a call that is not counted, or None for another error.

        Args:
            error: The error that the call has raised.
            name: The name of the call.
        """
        if self.watch is None or self._is_inside:
            return None
        self.state = self.state._replace(name=name, since=time.monotonic())
        return self.watch.explain(error)

    @contextmanager
    def waiting_for(self, prefix: str) -> Iterator[None]:
        """Surround a wait in the group's store that the watch can end.

        Args:
            prefix: The prefix of the keys `failed` and `done`. The wait ends when `done` is set.
        """
        self.waits_for = prefix
        try:
            # Now: a watch that has judged before has not seen the prefix.
            self.refuse()
            yield
        finally:
            self.waits_for = ""

    def enter(self, kind: str, name: str) -> None:
        """Begin a call."""
        watch = self.watch
        assert watch is not None
        watch.refuse()
        self._is_inside = True
        self.thread = get_ident()
        before = self.state
        meetings, exchanges = before.meetings + (kind == MEETING), before.exchanges + (kind == EXCHANGE)
        self.state = State(meetings, exchanges, kind, name, False, time.monotonic())
        if kind != MEETING:
            return
        try:
            watch.meet(meetings, name.partition("(")[0])
        except BaseException:
            self.leave()
            raise
        self.state = State(meetings, 0, kind, name, True, self.state.since)

    def leave(self) -> None:
        """End the call."""
        before = self.state
        self._is_inside = False
        self.state = State(before.meetings, before.exchanges, "", before.name, False, time.monotonic())

    @property
    def is_inside(self) -> bool:
        """Whether a thread of this process is in a call."""
        return self._is_inside

    def forget(self) -> None:
        """Forget all calls: another group begins, or this is a new process."""
        self.__init__()  # type: ignore[misc]


class Call:
    """The context of one call."""

    __slots__ = ("_calls", "_is_outer", "_kind", "_name")

    def __init__(self, calls: Calls, kind: str, name: str) -> None:
        self._calls, self._kind, self._name = calls, kind, name
        self._is_outer = False

    def __enter__(self) -> bool:
        """Enter the call, and return whether all ranks have met in it."""
        calls = self._calls
        if calls.watch is not None and not calls.is_inside:
            calls.enter(self._kind, self._name)
            self._is_outer = True
            return self._kind == MEETING
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_outer:
            return
        watch = self._calls.watch
        try:
            if isinstance(error, Exception) and watch is not None:
                explained = watch.explain(error)
                if explained is not None:
                    raise explained from explained.__cause__
        finally:
            self._calls.leave()


#: The calls of this process.
CALLS = Calls()
