"""Sweep over the tensors in files: a few threads read a few MiB at a time, and a meter counts the bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.report.meter import Meter

#: The size of one range.
RANGE_BYTES = 8 << 20
_MAX_THREADS = 4


class StoppedError(Exception):
    """Another thread failed, so this thread stops; `Sweep.run` does not raise this error."""


class Sweep:
    """Work on many tensors, one job for each.

    Args:
        total_bytes: The number of bytes that all jobs read.
        description: The text before the bar.
    """

    def __init__(self, total_bytes: int, description: str) -> None:
        self._meter = Meter(total_bytes, description)
        self._failures: list[BaseException] = []

    def run(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Do all jobs. The first error stops them all and is raised.

        Args:
            jobs: The jobs, in the order of their tensors on disk. Each calls `ranges` or `advance`, which stop the job
                after an error.
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
            except BaseException as error:  # an interrupt while this thread waits
                self._failures.append(error)
            for thread in others:
                thread.join()
        if self._failures:
            raise self._failures[0]

    def advance(self, size_bytes: int) -> None:
        """Count bytes as done.

        Raises:
            StoppedError: Another thread has failed.
        """
        if self._failures:
            raise StoppedError
        self._meter.add(size_bytes)

    def ranges(self, stored: StoredTensor) -> Iterator[tuple[int, Tensor]]:
        """Read a tensor, and yield ranges of its elements as (first element, values).

        The next range overwrites the values.

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
    """Yield the ranges of a tensor's elements as (first, end)."""
    step = RANGE_BYTES // stored.dtype.itemsize
    for start in range(0, stored.numel, step):
        yield start, min(start + step, stored.numel)


def in_order(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """Return tensors in their order on disk."""
    return sorted(tensors, key=lambda stored: stored.order(0))


def num_threads() -> int:
    """Return the number of threads that read."""
    try:
        return max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0))))
    except AttributeError:  # not on macOS
        return max(1, min(_MAX_THREADS, os.cpu_count() or 1))
