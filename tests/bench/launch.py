"""Two ranks that say hello and meet at a barrier: a fresh process, by a library and a way, timed from outside.

`python -m tests.bench.launch nucleate script` is the program that is timed; the function `launch` times it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

from tests.bench.markdown import escaped, seconds, table
from tests.bench.measure import MeasurementError, Numbers, Series, take
from tests.bench.section import Section
from tests.multi.ranks import ROOT

LIBRARIES = {"nucleate": "nucleate", "fabric": "Fabric"}
WAYS = {
    "script": "`launch()`: the script again",
    "function": "`launch(main)`, as a script does by default",
    "fork": '`launch(main)` with `strategy="ddp_fork"`',
    "spawn": '`launch(main)` with `strategy="ddp_spawn"`',
}
_HELLO = "hello from rank"
#: The goal: the largest share of Fabric's time.
ALLOWED = 0.5


def launch(runs: int, ways: Iterable[str] = WAYS) -> Section:
    """Measure the whole time of a program on two ranks, from its start to its end."""
    for library in LIBRARIES:
        time_program(library, "script")  # Reads the files, which may no longer be in memory, and writes the byte code.
    ways = list(ways)
    measurements = {f"{way} {library}": partial(time_program, library, way) for way in ways for library in LIBRARIES}
    taken = take(measurements, runs, what="launch")
    rows = [_row(way, taken[f"{way} nucleate"], taken[f"{way} fabric"]) for way in ways]
    faults = [f"launch {name}: {one.failure}" for name, one in taken.items() if one.failure and "nucleate" in name]
    header = ["two ranks on the CPU say hello", "nucleate, s", "Fabric, s", "ratio", f"under {ALLOWED}"]
    return Section(table(header, rows), taken, faults)


def time_program(library: str, way: str) -> Numbers:
    """Run the program in a fresh process, and return its whole time."""
    command = [sys.executable, "-m", "tests.bench.launch", library, way]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    wall_s = time.perf_counter() - start
    if done.returncode != 0 or done.stdout.count(_HELLO) != 2:
        raise MeasurementError(f"exit code {done.returncode}: {(done.stderr or done.stdout)[-300:]}")
    return {"wall_s": wall_s}


def _row(way: str, ours: Series, theirs: Series) -> list[str]:
    failed = next((one.failure for one in (ours, theirs) if one.failure is not None), None)
    if failed is not None:
        return [WAYS[way], f"failed: {escaped(failed)}", "", "", ""]
    ratio = ours.median("wall_s") / theirs.median("wall_s")
    times = [seconds(one.values("wall_s")) for one in (ours, theirs)]
    return [WAYS[way], *times, f"{ratio:.2f}", "yes" if ratio < ALLOWED else "**no**"]


def hello(runtime: Any) -> int:
    """Say hello on this rank, and wait for the other one."""
    runtime.barrier()
    # One write: two ranks would mix the words of `print`.
    sys.stdout.write(f"{_HELLO} {runtime.global_rank} of {runtime.world_size}\n")
    sys.stdout.flush()
    return int(runtime.world_size)


def main(library: str, way: str) -> None:
    options: dict[str, Any] = {"strategy": f"ddp_{way}"} if way in ("fork", "spawn") else {}
    runtime: Any
    if library == "nucleate":
        from nucleate import Runtime

        runtime = Runtime(accelerator="cpu", devices=2, **options)
    else:
        from lightning.fabric import Fabric

        runtime = Fabric(accelerator="cpu", devices=2, **options)
    if way == "script":
        runtime.launch()
        hello(runtime)
    else:
        runtime.launch(hello)


if __name__ == "__main__":
    main(*sys.argv[1:])
