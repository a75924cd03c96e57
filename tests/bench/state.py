"""The two states of memory that a measurement may start in: never touched before, or touched and given back just now.

On many virtual machines the host takes back what a guest has not used for a while. The first touch of such memory is
slower, by 2 to 15 times, than that of memory which was in use a moment ago. A user's first run meets the former.
"""

from __future__ import annotations

import time

from tests.bench.memory import available_bytes, prefault

UNTOUCHED, TOUCHED = "untouched", "touched"
STATES = (UNTOUCHED, TOUCHED)
#: A machine that gives free memory back to its host has done so after about 4 s in which nothing runs.
IDLE_S = 4.0


def enter(state: str, size_bytes: int, processes: int = 1, idle_s: float = IDLE_S) -> None:
    """Bring the machine's free memory into a state.

    Args:
        state: One of `STATES`.
        size_bytes: How much is touched, at most 80 percent of what is available.
        processes: How many processes do this at the same time.
        idle_s: How long nothing runs before untouched memory is measured.
    """
    if state == UNTOUCHED:
        time.sleep(idle_s)
    else:
        prefault(min(size_bytes, int(0.8 * available_bytes() / processes)))
