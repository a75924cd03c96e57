"""The sections of the benchmark page: what is measured for each, and the Markdown that comes of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.construct import WAYS
from tests.bench.measure import Numbers, Series, in_process, on_ranks, take
from tests.bench.model import INITS, SIZES, num_parameters

SEED = 1

#: Pairs of blocks and steps in a block: a second or more each, of blocks that drift does not reach.
BLOCKS = {"micro": (60, 20), "1m": (30, 4), "10m": (12, 2), "100m": (6, 1), "1b": (4, 1)}
_HOW = {
    "plain": "initialized once, by torch's modules",
    "again": "initialized and then drawn again, all of them, as GPT-2 does",
    "llama": "transformers' `LlamaForCausalLM`, which initializes twice",
}
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


@dataclass
class Section:
    """What one benchmark gave.

    Attributes:
        text: Its Markdown.
        series: Its numbers, by what was measured.
        faults: What must not be: nucleate failed, or its results are not eager's.
        draw: Draws its picture into the folder of the page, if it has one.
    """

    text: str
    series: dict[str, Series]
    faults: list[str]
    draw: Callable[[Path], object] | None = None


def construct(size: str, runs: int, inits: Sequence[str] = INITS, ways: Iterable[str] = WAYS) -> Section:
    """Measure the construction of a model, in every way."""
    parts: list[str] = []
    series: dict[str, Series] = {}
    faults: list[str] = []
    parameters = num_parameters(SIZES[size])
    for init in inits:
        taken = take(
            {name: partial(_construct, name, size, init) for name in WAYS if name in ways},
            runs,
            once=[name for name, way in WAYS.items() if way.once],
            what=f"construct {size} {init}",
        )
        series |= {f"{init} {name}": one for name, one in taken.items()}
        eager = taken["eager"]
        if eager.failure is not None:
            raise RuntimeError(f"eager construction failed: {eager.failure}")
        expected = {key: eager.values(key)[0] for key in ("weights", "stream")}
        parts.append(f"### {millions(parameters)} parameters, {_HOW[init]}")
        for ranks, baseline in ((1, "eager"), (2, "eager-ranks"), (4, "eager-ranks-4")):
            rows = {name: one for name, one in taken.items() if WAYS[name].ranks == ranks}
            if rows:
                parts.append(_construct_table(rows, taken.get(baseline, eager), expected, ranks))
        for name, one in taken.items():
            if WAYS[name].ours:
                faults += [f"{init} {name}: {fault}" for fault in _faults(one, expected)]
    return Section("\n\n".join(parts), series, faults)


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
        "meta": 'transformers under `torch.device("meta")`: nothing can be made of it',
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


def _construct(name: str, size: str, init: str) -> Numbers:
    arguments = (name, "--size", size, "--init", init, "--seed", str(SEED))
    if WAYS[name].ranks == 1:
        return in_process("-m", "tests.bench.construct", *arguments)
    return on_ranks("tests.bench.construct", WAYS[name].ranks, *arguments)


def _import(statement: str) -> Numbers:
    program = _IMPORT.format(statement=statement)
    in_process("-c", program)  # Reads the files, which may no longer be in memory, and writes the byte code.
    return in_process("-c", program)


def _construct_table(rows: dict[str, Series], baseline: Series, expected: dict[str, str], ranks: int) -> str:
    where = "one process" if ranks == 1 else f"{ranks} gloo ranks, the slower and the larger one"
    header = [where, "first use, s", "build, s", "x eager", "CPU, s", "of it values", "peak, MiB", "x eager"]
    header += ["weights = eager's", "stream"]
    cells = []
    for name, one in rows.items():
        label = WAYS[name].label
        if one.failure is not None:
            cells.append([label, f"does not run: {escaped(one.failure)}", *[""] * 8])
            continue
        cells.append(
            [
                label,
                f"{one.median('first_use_s'):.2f}",
                seconds(one.values("wall_s")),
                f"{one.median('wall_s') / baseline.median('wall_s'):.2f}" if baseline.runs else "",
                f"{one.median('cpu_s'):.2f}",
                f"{one.median('part_cpu_s'):.2f}" if WAYS[name].ours else "",
                f"{one.median('peak_bytes') / 2**20:.0f}",
                f"{one.median('peak_bytes') / max(baseline.median('peak_bytes'), 1):.2f}" if baseline.runs else "",
                *("yes" if one.every(key, expected[key]) else "**no**" for key in ("weights", "stream")),
            ]
        )
    return table(header, cells)


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


def _faults(one: Series, expected: dict[str, str]) -> list[str]:
    if one.failure is not None:
        return [one.failure]
    return [f"the {key} are not eager's" for key, value in expected.items() if not one.every(key, value)]


def table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def seconds(values: list[Any]) -> str:
    """Write the median, and how far the runs lie apart."""
    if not values:
        return ""
    digits = 3 if statistics.median(values) < 0.2 else 2
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def millions(parameters: int) -> str:
    if parameters >= 10**9:
        return f"{parameters / 1e9:.2f} billion"
    return f"{parameters / 1e6:.2g} million" if parameters < 10**8 else f"{parameters / 1e6:.0f} million"


def escaped(text: str) -> str:
    return text.replace("|", "\\|")
