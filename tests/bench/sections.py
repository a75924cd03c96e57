"""The sections whose numbers do not depend on the state of memory: recording, training steps and imports."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from functools import partial

from tests.bench.markdown import escaped, millions, seconds, table
from tests.bench.measure import Numbers, Series, in_process, take
from tests.bench.model import SIZES, num_parameters
from tests.bench.section import Section

#: Pairs of blocks and steps in a block: a second or more each, of blocks that drift does not reach.
BLOCKS = {"micro": (60, 20), "1m": (30, 4), "10m": (12, 2), "100m": (6, 1), "1b": (4, 1)}
LOOPS = {"raw": "the raw loop again", "nucleate": "nucleate", "fabric": "Fabric"}

IMPORTS = {
    "nucleate": ("`import nucleate`", "import nucleate"),
    "nucleate-runtime": ("`from nucleate import Runtime`", "from nucleate import Runtime"),
    "nucleate-made": (
        '... and `Runtime(accelerator="cpu")`',
        "from nucleate import Runtime; Runtime(accelerator='cpu')",
    ),
    "fabric": ("`from lightning.fabric import Fabric`", "from lightning.fabric import Fabric"),
    "fabric-made": (
        '... and `Fabric(accelerator="cpu")`',
        "from lightning.fabric import Fabric; Fabric(accelerator='cpu')",
    ),
}
_IMPORT = """
import time
start = time.perf_counter()
import torch
torch_s = time.perf_counter() - start
start = time.perf_counter()
{statement}
over_s = time.perf_counter() - start
import json, sys
print("MEASURED " + json.dumps({{"torch_s": torch_s, "over_s": over_s, "modules": len(sys.modules)}}), flush=True)
"""


def step(sizes: Sequence[str], runs: int, loops: Iterable[str] = LOOPS, quick: bool = False) -> Section:
    """Measure what wrappers add to a training step."""
    parts: list[str] = []
    series: dict[str, Series] = {}
    faults: list[str] = []
    for size in sizes:
        pairs, steps = (3, 2) if quick else BLOCKS[size]
        rest = ("--size", size, "--pairs", str(pairs), "--steps", str(steps))
        # Microseconds of Python drown in what threads do to each other.
        threads = 1 if size == "micro" else None
        measurements = {
            name: partial(in_process, "-m", "tests.bench.train", name, *rest, threads=threads) for name in loops
        }
        taken = take(measurements, runs, what=f"step {size}")
        series |= {f"{size} {name}": one for name, one in taken.items()}
        config = SIZES[size]
        tokens = f"{config.batch_size} x {config.context} tokens a step"
        how = "one thread" if threads else "torch's own number of threads"
        parts.append(f"### {millions(num_parameters(config))} parameters, {tokens}, {how}")
        parts.append(_step_table(taken))
        ours = taken.get("nucleate")
        if ours is not None and (ours.failure or not ours.every("same_losses", True)):
            faults.append(f"step {size}: {ours.failure or 'the losses are not those of the raw loop'}")
    return Section("\n\n".join(parts), series, faults)


def record(runs: int) -> Section:
    """Measure how long it takes to record a model of 70 billion parameters, and what the record takes."""
    names = {
        "meta": 'transformers under `torch.device("meta")`: it cannot be materialized',
        "nucleate": "transformers under nucleate's `deferred()`",
    }
    taken = take({name: partial(in_process, "-m", "tests.bench.record", name) for name in names}, runs, what="record")
    rows = []
    for name, one in taken.items():
        if one.failure is not None:
            rows.append([names[name], f"failed: {escaped(one.failure)}", "", ""])
            continue
        peak = f"{one.median('peak_bytes') / 2**20:.1f}"
        rows.append([names[name], f"{one.median('first_use_s'):.2f}", seconds(one.values("wall_s")), peak])
    faults = [f"record nucleate: {one.failure}" for name, one in taken.items() if name == "nucleate" and one.failure]
    return Section(table(["Llama 70B", "first use, s", "construct, s", "peak, MiB"], rows), taken, faults)


def imports(runs: int, names: Iterable[str] = IMPORTS) -> Section:
    """Measure imports over `import torch`."""
    taken = take({name: partial(_import, IMPORTS[name][1]) for name in names}, runs, what="import")
    every_torch = [seconds for one in taken.values() for seconds in one.values("torch_s")]
    torch_s = statistics.median(every_torch) if every_torch else float("nan")
    rows = [["`import torch` itself", seconds(every_torch), "1.00", ""]]
    for name, one in taken.items():
        label = IMPORTS[name][0]
        if one.failure is not None:
            rows.append([label, f"failed: {one.failure}", "", ""])
            continue
        over = one.median("over_s") / torch_s
        rows.append([label, seconds(one.values("over_s")), f"{over:.2f}", f"{one.median('modules'):.0f}"])
    faults = [f"import {name}: {one.failure}" for name, one in taken.items() if one.failure and "nucleate" in name]
    return Section(table(["after `import torch`", "s", "x torch", "modules loaded"], rows), taken, faults)


def _import(statement: str) -> Numbers:
    program = _IMPORT.format(statement=statement)
    in_process("-c", program)  # Reads the files, which may no longer be in memory, and writes the byte code.
    return in_process("-c", program)


def _step_table(taken: dict[str, Series]) -> str:
    cells = []
    for name, one in taken.items():
        if one.failure is not None:
            cells.append([LOOPS[name], f"failed: {escaped(one.failure)}", *[""] * 4])
            continue
        added = [seconds * 1e6 for seconds in one.values("added_s")]
        cells.append(
            [
                LOOPS[name],
                f"{one.median('raw_s') * 1e3:.2f}",
                f"{statistics.median(added):+.0f}",
                f"{min(added):+.0f} to {max(added):+.0f}",
                f"{statistics.median(added) / one.median('raw_s') / 1e4:+.2f} %",
                "yes" if one.every("same_losses", True) else "**no**",
            ]
        )
    return table(["", "raw step, ms", "added, µs", "runs", "added", "same losses"], cells)
