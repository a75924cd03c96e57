"""The choice between huge pages and small ones for memory that is touched first, from how long each kind took before.

A huge page replaces 512 faults by one, and costs a tenth where the machine has the memory. A virtual machine that gave
its idle memory back to the host has to ask for it again: there a huge page of 2 MiB can cost ten times as much as the
small pages, which come first from fragments that the system still holds. A machine has both kinds of memory at once,
and nothing tells which comes next. So each stretch of memory is timed.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

#: How many bytes are touched and timed at a time: one huge page.
STRETCH_BYTES = 2 << 20

# The kind that seems slower is tried again when what that lost the last time is this part of the time spent since.
_TRIAL_SHARE = 0.01
# A kind is known after so many stretches, of which the quickest counts: the host of a virtual machine may be busy for a
# moment. Later one stretch is a trial, so that what a trial loses stays small and the next one comes soon.
_FIRST_STRETCHES = 2
# How much the newest stretch counts: a few slow ones in a row change the choice, a single one does only if it is slow
# by far.
_NEWEST = 0.25
# The other kind has to be quicker by so much, or small differences would change the choice again and again.
_QUICKER = 0.8
# The system cannot clear 2 MiB in less, so the pages were there already.
_PRESENT_S = 30e-6


@dataclass(slots=True)
class _Kind:
    """The times of one kind of pages.

    Attributes:
        cost_s: Seconds for a stretch, lately; None before the first.
        last_s: Seconds for the last one.
        total_s: Seconds for all stretches.
        stretches: How many there were.
    """

    cost_s: float | None = None
    last_s: float = 0.0
    total_s: float = 0.0
    stretches: int = 0


class PagePolicy:
    """Chooses the kind of pages for each stretch of 2 MiB, and learns from how long it took. Any thread may ask.

    Args:
        fixed: True for huge pages always, False for small pages always, None to choose by the times.
    """

    def __init__(self, fixed: bool | None = None) -> None:
        self._fixed = fixed
        self._kinds = {True: _Kind(), False: _Kind()}
        self._is_huge = fixed is not False
        # Seconds spent since the other kind was tried, what that lost, how many of its stretches are still to be asked
        # for and how many are asked for in all, and the times of those that were taken.
        self._since_s = 0.0
        self._lost_s = 0.0
        self._to_ask = self._num_asked = 0
        self._trial: list[float] = []
        self._lock = threading.Lock()

    @property
    def is_huge(self) -> bool:
        """Whether huge pages are the choice, apart from trials."""
        return self._is_huge

    def choose(self) -> bool:
        """Return whether the next stretch is to be a huge page. `took` is to be called with the result."""
        with self._lock:
            if self._to_ask:
                self._to_ask -= 1
                return not self._is_huge
            return self._is_huge

    def took(self, huge: bool, seconds: float) -> None:
        """Learn how long a stretch took.

        Args:
            huge: Whether it was touched as a huge page.
            seconds: Of the thread that touched it, without the time in which it was not running.
        """
        if seconds < _PRESENT_S:
            return
        with self._lock:
            kind = self._kinds[huge]
            kind.stretches += 1
            kind.total_s += seconds
            kind.last_s = seconds
            if self._fixed is not None:
                return
            if huge == self._is_huge:
                self._count(kind, seconds)
                self._since_s += seconds
            else:
                self._trial.append(seconds)
                if len(self._trial) >= self._num_asked:
                    self._end_trial(kind)
            self._choose_again()

    def describe(self) -> str:
        """Return how much was touched in which kind of pages, and how long 2 MiB took."""
        said = [
            f"{kind.stretches * STRETCH_BYTES / 2**30:.2f} GiB in {'huge' if huge else 'small'} pages "
            f"({kind.total_s / kind.stretches * 1e3:.2f} ms for 2 MiB)"
            for huge, kind in self._kinds.items()
            if kind.stretches
        ]
        return " and ".join(said) or "nothing"

    def _count(self, kind: _Kind, seconds: float) -> None:
        if kind.cost_s is None or kind.stretches <= _FIRST_STRETCHES:
            kind.cost_s = seconds if kind.cost_s is None else min(seconds, kind.cost_s)
        else:
            kind.cost_s += _NEWEST * (seconds - kind.cost_s)

    def _end_trial(self, kind: _Kind) -> None:
        chosen_s = self._kinds[self._is_huge].cost_s or 0.0
        kind.cost_s = min(self._trial)
        self._lost_s = max(0.0, sum(self._trial) - len(self._trial) * chosen_s)
        self._since_s = 0.0
        self._trial.clear()

    def _choose_again(self) -> None:
        chosen, other = self._kinds[self._is_huge], self._kinds[not self._is_huge]
        if chosen.cost_s is None or chosen.stretches < _FIRST_STRETCHES:
            return
        if other.cost_s is not None and other.cost_s < _QUICKER * chosen.cost_s:
            self._is_huge = not self._is_huge
            self._lost_s = chosen.last_s - other.cost_s
            self._since_s = 0.0
            self._to_ask = 0
            self._trial.clear()
        elif not self._to_ask and not self._trial and self._since_s * _TRIAL_SHARE >= self._lost_s:
            self._to_ask = self._num_asked = _FIRST_STRETCHES if other.cost_s is None else 1
