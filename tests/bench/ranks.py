"""The ranks of one measurement, or the one process: they wait for each other, and the worst of their numbers counts."""

from __future__ import annotations

import os
import time
from typing import Any, NoReturn

import torch.distributed as dist

from tests.bench.measure import Numbers, report


def barrier() -> None:
    """Wait for the other ranks, where there are any."""
    if dist.is_initialized():
        dist.barrier()


def is_first() -> bool:
    """Return whether this is the only process, or rank 0."""
    return not dist.is_initialized() or dist.get_rank() == 0


def report_and_end(mine: Numbers) -> NoReturn:
    """Report the worst numbers of all ranks, and end this process."""
    every = [mine]
    if dist.is_initialized():
        every = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, mine)
    if is_first():
        report({key: over_ranks([one[key] for one in every]) for key in mine})
    if dist.is_initialized():
        dist.barrier()
        time.sleep(0.2)
    # Not by the interpreter: gloo's threads now and then abort its exit, and nothing is left to be done.
    os._exit(0)


def over_ranks(values: list[Any]) -> Any:
    """Return the worst number; of texts the one that all ranks have."""
    if None in values:
        return None
    if isinstance(values[0], str):
        return values[0] if len(set(values)) == 1 else "the ranks differ"
    return max(values)
