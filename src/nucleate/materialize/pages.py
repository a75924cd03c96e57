"""The choice between huge and small pages for memory that is touched first, by the times that each kind took before.

A huge page replaces 512 faults by one, and takes a tenth of the time where the machine has the memory. A virtual
machine that gave its idle memory back to the host has to request it again. There a huge page of 2 MiB can take ten
times as long as the small pages, which come first from fragments that the system still holds. A machine has both kinds
of memory at once, and nothing shows which kind comes next. So each stretch of memory is timed.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

#: The number of bytes that are touched and timed at a time: one huge page.
STRETCH_BYTES = 2 << 20

# The kind that seems slower is tried again when the time lost by its last trial is this share of the time spent since.
_TRIAL_SHARE = 0.01
# The cost of a kind is the median time of so many last stretches: the host of a virtual machine may be busy for a
# moment.
_LAST_STRETCHES = 3
# The first trial takes so many stretches. Later ones take one, so that they lose little and the next one comes soon.
_FIRST_STRETCHES = 2
# One of so many huge pages is touched ahead and timed, while huge pages are quick. The writer's own faults make the
# others as quickly, and the processor's cache then holds them for the writer's first bytes.
_TIMED_HUGE = 4
# The other kind has to take less than this share of the time, or small differences would change the choice again and
# again.
_QUICKER = 0.8
# The system cannot clear 2 MiB in less time, so the pages were present already.
_PRESENT_S = 30e-6


@dataclass(slots=True)
class _Kind:
    """The times of one kind of pages.

    Attributes:
        lately: Seconds for each of the last stretches.
        total_s: Seconds for all stretches.
        stretches: The number of these stretches.
        left: The number of other stretches, which were left to their writers.
    """

    lately: deque[float] = field(default_factory=lambda: deque(maxlen=_LAST_STRETCHES))
    total_s: float = 0.0
    stretches: int = 0
    left: int = 0

    @property
    def is_known(self) -> bool:
        """Whether there were enough stretches to know the cost."""
        return len(self.lately) >= _FIRST_STRETCHES

    @property
    def cost_s(self) -> float:
        """Seconds for a stretch. Of two stretches, the quicker one counts."""
        return sorted(self.lately)[(len(self.lately) - 1) // 2]


class PagePolicy:
    """The choice of the kind of pages for each stretch of 2 MiB, by the times of earlier stretches. It is thread-safe.

    Args:
        fixed: True to always use huge pages, False to always use small pages, None to choose by the times.
    """

    def __init__(self, fixed: bool | None = None) -> None:
        self._fixed = fixed
        self._kinds = {True: _Kind(), False: _Kind()}
        self._is_huge = fixed is not False
        # The seconds spent since the last trial of the other kind, and the seconds that this trial lost. Of the current
        # trial: the stretches that are still to be requested, all its stretches, and the times of those that were
        # touched.
        self._since_s = 0.0
        self._lost_s = 0.0
        self._to_ask = self._num_asked = self._untimed = 0
        self._trial: list[float] = []
        self._lock = threading.Lock()

    @property
    def is_huge(self) -> bool:
        """Whether huge pages are the choice, apart from trials."""
        return self._is_huge

    def choose(self, may_leave: bool = True) -> bool | None:
        """Return whether to use a huge page for the next stretch. The caller then calls `took` with the time.

        Args:
            may_leave: Whether the writer follows at once, so that the stretch may be left to the writer.

        Returns:
            True or False; None if the stretch is not touched ahead and the writer gets a huge page.
        """
        with self._lock:
            if self._to_ask:
                self._to_ask -= 1
                return not self._is_huge
            kind = self._kinds[True]
            # A slow huge page may be the first of many.
            is_quick = kind.is_known and kind.lately[-1] <= kind.cost_s / _QUICKER
            if may_leave and is_quick and self._is_huge and self._fixed is None:
                self._untimed = (self._untimed + 1) % _TIMED_HUGE
                if self._untimed:
                    kind.left += 1
                    return None
            return self._is_huge

    def took(self, huge: bool, seconds: float) -> None:
        """Learn from the time of a stretch.

        Args:
            huge: Whether the stretch was touched as a huge page.
            seconds: The time of the thread that touched it, without the time in which the thread was not running.
        """
        if seconds < _PRESENT_S:
            return
        with self._lock:
            kind = self._kinds[huge]
            kind.stretches += 1
            kind.total_s += seconds
            kind.lately.append(seconds)
            if self._fixed is not None:
                return
            if huge == self._is_huge:
                self._since_s += seconds
            else:
                self._trial.append(seconds)
                if len(self._trial) >= self._num_asked:
                    self._end_trial()
            self._choose_again()

    def describe(self) -> str:
        """Return a text with the memory that was touched in each kind of pages, and with the time of 2 MiB."""
        said = [
            f"{(kind.stretches + kind.left) * STRETCH_BYTES / 2**30:.2f} GiB in {'huge' if huge else 'small'} pages "
            f"({kind.total_s / kind.stretches * 1e3:.2f} ms for 2 MiB)"
            for huge, kind in self._kinds.items()
            if kind.stretches
        ]
        return " and ".join(said) or "nothing"

    def _end_trial(self) -> None:
        self._lost_s = max(0.0, sum(self._trial) - len(self._trial) * self._kinds[self._is_huge].cost_s)
        self._since_s = 0.0
        self._trial.clear()

    def _choose_again(self) -> None:
        chosen, other = self._kinds[self._is_huge], self._kinds[not self._is_huge]
        if not chosen.is_known:
            return
        if other.is_known and other.cost_s < _QUICKER * chosen.cost_s:
            self._is_huge = not self._is_huge
            self._lost_s = chosen.cost_s - other.cost_s
            self._since_s = 0.0
            self._to_ask = 0
            self._trial.clear()
        elif not self._to_ask and not self._trial and self._since_s * _TRIAL_SHARE >= self._lost_s:
            self._to_ask = self._num_asked = 1 if other.is_known else _FIRST_STRETCHES
