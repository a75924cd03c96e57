"""Judges many cases in worker processes, one name at a time: what crashes or hangs costs its case only."""

from __future__ import annotations

import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

from tests.architectures.families import limits

#: A worker is replaced after so many cases, because imported models and caches pile up.
CASES_PER_WORKER = 150


class Worker:
    """One process that judges what it is told."""

    def __init__(self, family: str) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "critical",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.architectures.worker", family],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True,
        )  # fmt: skip
        self.num_cases = 0
        self.limit_s = limits(family).case_s

    def judge(self, name: str) -> dict[str, Any]:
        """Return the verdict as a dictionary; what went wrong with the process is one as well."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.num_cases += 1
        try:
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = _line(self.process.stdout, self.limit_s)
        if line:
            verdict: dict[str, Any] = json.loads(line)
            return verdict
        state = f"the worker ended with {self.process.wait()}" if line == "" else f"no answer in {self.limit_s:.0f} s"
        self.close()
        return {"name": name, "outcome": "crashed", "details": [state], "early": [], "note": {}}

    @property
    def is_usable(self) -> bool:
        return self.process.poll() is None and self.num_cases < CASES_PER_WORKER

    def close(self) -> None:
        self.process.kill()
        # Also closes the pipes.
        self.process.communicate()


def _line(stream: IO[str], limit_s: float) -> str | None:
    """Return the next line, "" at the end of the stream, or None when there is none in time."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return stream.readline() if selector.select(limit_s) else None


def judge_all(family: str, names: list[str], jobs: int) -> Iterator[dict[str, Any]]:
    """Yield the verdicts of all names, as they come.

    Args:
        family: Which family they are of.
        names: The cases.
        jobs: How many processes work on them.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)

    def work() -> None:
        worker: Worker | None = None
        while True:
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                break
            if worker is None or not worker.is_usable:
                if worker is not None:
                    worker.close()
                worker = Worker(family)
            started = time.perf_counter()
            verdict = worker.judge(name)
            done.put({**verdict, "wall_s": time.perf_counter() - started})
        if worker is not None:
            worker.close()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for _ in names:
        yield done.get()
    for thread in threads:
        thread.join()
