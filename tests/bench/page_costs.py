"""The time that the first touch of 2 MiB takes on this machine: as a huge page and as small ones, in each state.

    python -m tests.bench.page_costs

Which of the two is faster differs from machine to machine, and with it what a first run costs beside a second one. So
it stands under each table whose times depend on it.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import time
from collections.abc import Sequence

import torch

from tests.bench.measure import report
from tests.bench.state import STATES, enter

HUGE_BYTES = 2 * 2**20
#: Longer than elsewhere, because this measures the state itself.
IDLE_S = 15.0
#: Enough that most of it does not come from fragments which the system still holds.
NUM_PIECES = 192
KINDS = {"huge": mmap.MADV_HUGEPAGE, "small": mmap.MADV_NOHUGEPAGE}


def cost_ms(kind: str, num_pieces: int = NUM_PIECES) -> float:
    """Return the median time of the first touch of 2 MiB, by one thread that writes to each small page.

    Args:
        kind: Which of `KINDS`; a huge page is one only where the system allows it.
        num_pieces: How many times 2 MiB are touched.
    """
    with mmap.mmap(-1, (num_pieces + 1) * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(KINDS[kind])
        pages = torch.frombuffer(memory, dtype=torch.uint8)
        begin = -pages.data_ptr() % HUGE_BYTES
        times = []
        for offset in range(begin, begin + num_pieces * HUGE_BYTES, HUGE_BYTES):
            start = time.perf_counter()
            pages[offset : offset + HUGE_BYTES : mmap.PAGESIZE].fill_(1)
            times.append(time.perf_counter() - start)
        # A mapping does not end while something looks into it.
        del pages
    return statistics.median(times) * 1e3


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--idle-s", type=float, default=IDLE_S)
    parser.add_argument("--pieces", type=int, default=NUM_PIECES)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cost_ms("small", 1)
    costs = {}
    for state in STATES:
        for kind in KINDS:
            enter(state, 2 * args.pieces * HUGE_BYTES, idle_s=args.idle_s)
            costs[f"{state} {kind}"] = cost_ms(kind, args.pieces)
    report(costs)


if __name__ == "__main__":
    main()
