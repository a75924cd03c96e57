"""Touching as many bytes as a model keeps, in small pages and in huge ones: the floor under all ways to fill memory.

These two rows also show whether memory was untouched: the host then takes several times as long for huge pages.
"""

from __future__ import annotations

from functools import partial

from tests.bench.by_state import Measure
from tests.bench.measure import Numbers, in_process, on_ranks

TOUCH, TOUCH_HUGE = "touch-pages", "touch-huge"
#: The rows of a table that say how long touching takes.
TOUCHES = {
    TOUCH: "the memory: as many bytes as are kept, touched page by page of 4 KiB",
    TOUCH_HUGE: "the memory: as many bytes as are kept, touched in huge pages",
}


def touching(num_bytes: int, ranks: int, idle_s: float) -> dict[str, Measure]:
    """Return measurements: each rank touches so much memory, with as many threads as torch has there."""
    arguments = ("--bytes", str(num_bytes), "--idle-s", str(idle_s))
    return {touch: partial(in_state, ranks, "tests.bench.bare", touch, *arguments) for touch in TOUCHES}


def in_state(ranks: int, module: str, *arguments: str) -> Numbers:
    """Run a module, alone or on ranks, and return what it reports; the last argument is the state of memory."""
    *rest, state = arguments
    if ranks == 1:
        return in_process("-m", module, *rest, "--state", state)
    return on_ranks(module, ranks, *rest, "--state", state)
