"""The two states of memory that a measurement may start in: never touched before, or touched and given back just now.

On many virtual machines the host takes back what a guest has not used for a while. The first touch of such memory is
slower, by 2 to 50 times, than that of memory which was in use a moment ago. A user's first run meets the former.
"""

from __future__ import annotations

import argparse
import time

from tests.bench.memory import available_bytes, prefault

UNTOUCHED, TOUCHED = "untouched", "touched"
STATES = (UNTOUCHED, TOUCHED)
#: Nothing runs for so long before untouched memory is measured. The host of the docs' machine has 1 GiB back after 4 to
#: 12 s, and 4 GiB after 20 s; the rows that touch huge pages show how far it got.
IDLE_S = 4.0


def enter(state: str, size_bytes: int, processes: int = 1, idle_s: float = IDLE_S) -> None:
    """Bring the machine's free memory into a state; the last thing before the clock.

    Args:
        state: One of `STATES`.
        size_bytes: How much each process touches, at most 80 percent of what is available.
        processes: How many processes do this at the same time.
        idle_s: How long nothing runs before untouched memory is measured.
    """
    if state == UNTOUCHED:
        time.sleep(idle_s)
    else:
        prefault(min(size_bytes, int(0.8 * available_bytes() / processes)))


def add_state(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `enter` to the command of a process that measures."""
    parser.add_argument("--state", choices=STATES, default=UNTOUCHED)
    parser.add_argument("--idle-s", type=float, default=IDLE_S)
