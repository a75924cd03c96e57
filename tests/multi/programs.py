"""Programs that start ranks: run to their end, or ended before it, with a look at the processes that are left."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.multi.ranks import ROOT

#: The promise: after this time no process is left.
LIMIT_S = 5.0


def variables() -> dict[str, str]:
    place = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    found = {name: value for name, value in os.environ.items() if name not in place}
    return {**found, "PYTHONPATH": os.pathsep.join([str(ROOT), found.get("PYTHONPATH", "")])}


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables(),
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run(*command: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        input=stdin,
        capture_output=True,
        text=True,
        env=variables(),
        cwd=ROOT,
        timeout=200,
        check=False,
    )


def wait_for_ranks(process: subprocess.Popen[str], num: int = 2) -> list[int]:
    """Return the process ids of all ranks, once each has begun to work and has printed its own."""
    assert process.stdout is not None
    found: list[int] = []
    for line in process.stdout:
        found += map(int, re.findall(r"PID (\d+)", line))
        if len(found) == num:
            return found
    raise AssertionError(f"the ranks did not begin.\n{process.communicate()}")


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def all_end(pids: list[int]) -> bool:
    end = time.monotonic() + LIMIT_S
    while any(map(lives, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
