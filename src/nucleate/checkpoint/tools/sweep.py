"""Goes through tensors in files by a few threads, a few MiB of each at a time, and counts the bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.report.meter import Meter

#: What is looked at at a time.
RANGE_BYTES = 8 << 20
_MAX_THREADS = 4


class StoppedError(Exception):
    """Another thread failed; nobody hears of this one."""


class Sweep:
    """Work on many tensors, one job for each.

    Args:
        total_bytes: How many there are in all.
        description: What stands before the bar.
    """

    def __init__(self, total_bytes: int, description: str) -> None:
        self._meter = Meter(total_bytes, description)
        self._failures: list[BaseException] = []

    def run(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Do all jobs; the first error stops them all and is raised.

        Args:
            jobs: In the order in which they lie on disk. Each calls `ranges` or `advance`, which stop it.
        """
        waiting = iter(jobs)
        lock = threading.Lock()

        def work() -> None:
            try:
                while not self._failures:
                    with lock:
                        job = next(waiting, None)
                    if job is None:
                        return
                    with torch.inference_mode():
                        job()
            except StoppedError:
                pass
            except BaseException as error:
                self._failures.append(error)

        others = [threading.Thread(target=work, name="nucleate-sweep") for _ in range(num_threads() - 1)]
        with self._meter:
            for thread in others:
                thread.start()
            try:
                work()
                for thread in others:
                    thread.join()
            except BaseException as error:  # an interrupt while this one waits
                self._failures.append(error)
            for thread in others:
                thread.join()
        if self._failures:
            raise self._failures[0]

    def advance(self, size_bytes: int) -> None:
        """Count bytes that are done.

        Raises:
            StoppedError: Another thread has failed.
        """
        if self._failures:
            raise StoppedError
        self._meter.add(size_bytes)

    def ranges(self, stored: StoredTensor) -> Iterator[tuple[int, Tensor]]:
        """Read a tensor, and yield ranges of its elements as (first element, values).

        The values are overwritten by those of the next range.

        Raises:
            CheckpointError: The file is shorter than it was, or the disk fails.
        """
        buffer = torch.empty(min(stored.numel, RANGE_BYTES // stored.dtype.itemsize), dtype=stored.dtype, device="cpu")
        for start, stop in spans(stored):
            values = buffer[: stop - start]
            stored.read(start, values)
            yield start, values
            self.advance((stop - start) * stored.dtype.itemsize)


def spans(stored: StoredTensor) -> Iterator[tuple[int, int]]:
    """Yield the ranges of elements that are looked at at a time."""
    step = RANGE_BYTES // stored.dtype.itemsize
    for start in range(0, stored.numel, step):
        yield start, min(start + step, stored.numel)


def in_order(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """Return tensors in the order in which they lie on disk."""
    return sorted(tensors, key=lambda stored: stored.order(0))


def num_threads() -> int:
    """Return how many threads read."""
    try:
        return max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0))))
    except AttributeError:  # not on macOS
        return max(1, min(_MAX_THREADS, os.cpu_count() or 1))
