"""A number of workers of data loaders that fits the cores."""

from __future__ import annotations

import os


def suggested_max_num_workers(local_world_size: int) -> int:
    """Return how many workers the loader of each process can have: the process's part of the cores, less one.

    Args:
        local_world_size: The number of processes of this node.

    Raises:
        ValueError: The number is smaller than 1.
    """
    if local_world_size < 1:
        raise ValueError(f"local_world_size={local_world_size} must be at least 1.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size - 1)
