"""The section on loading: what is measured for each of its tables, and the goals that come of them."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from tests.bench.by_state import ByState, Measure, flat, header, take_in_states
from tests.bench.checkpoint_files import NUM_SHARDS, SHAPES, Files, kept_bytes, num_parameters
from tests.bench.floors import TOUCHES, in_state, touching
from tests.bench.goal import Goal, goals_table
from tests.bench.load_goals import LOAD_GOALS, Ratios, fixed_goals
from tests.bench.load_ways import WAYS
from tests.bench.markdown import escaped, failed, mib, millions, seconds, table
from tests.bench.measure import Numbers, Series, in_process, take
from tests.bench.section import Section
from tests.bench.state import IDLE_S, STATES

SINGLE = [name for name, way in WAYS.items() if way.ranks == 1]
RANKS = [name for name, way in WAYS.items() if way.ranks > 1]
#: The tables, and the ways in each.
PARTS = {
    "bf16": SINGLE,
    "fp32": ["nucleate", "transformers", "safe-open", "dcp", "accelerate", "fabric"],
    "cold": ["nucleate", "transformers", "safe-open", "dcp", "accelerate"],
    "ranks": RANKS,
    "fixed": [],
}
_TITLES = {
    "bf16": "bf16 files into a bf16 model, files in memory",
    "fp32": "fp32 files into a bf16 model, files in memory",
    "cold": "bf16 files into a bf16 model, files not in memory",
    "ranks": "bf16 files into a bf16 model on 2 FSDP ranks, files in memory",
    "fixed": "A tiny model of which nothing is made, in a process in which torch is imported",
}
_FIXED = {
    "nucleate": "nucleate's `deferred()`",
    "meta": '`torch.device("meta")`',
    "accelerate": "Accelerate's `init_empty_weights()`",
}
_FLOORS = {"disk": "the disk: the same files, one after the other in blocks of 8 MiB", **TOUCHES}


def load(
    size: str,
    runs: int,
    parts: Sequence[str] = tuple(PARTS),
    ways: Iterable[str] = WAYS,
    root: Path | None = None,
    states: Sequence[str] = STATES,
    idle_s: float = IDLE_S,
) -> Section:
    """Measure how a checkpoint is loaded, in every way.

    Args:
        size: Which of `SHAPES`.
        runs: Fresh processes for each number.
        parts: Which of `PARTS`.
        ways: Which of `WAYS`.
        root: Where the files are made, or found; by default a temporary folder.
        states: The states of memory in which loading begins.
        idle_s: How long nothing runs before untouched memory is measured.
    """
    texts: list[str] = []
    series: dict[str, Series] = {}
    faults: list[str] = []
    goals: list[Goal] = []
    chosen = set(ways)
    with tempfile.TemporaryDirectory() if root is None else nullcontext(root) as folder:
        root = Path(folder)
        if set(parts) - {"fixed"}:
            for each in ("micro", size):
                in_process("-m", "tests.bench.checkpoint_files", str(root), each)
        for part in parts:
            if part == "fixed":
                fixed = take({name: partial(_fixed, name) for name in _FIXED}, runs, what="load fixed")
                series |= {f"fixed {name}": one for name, one in fixed.items()}
                texts += [f"### {_TITLES[part]}", _fixed_table(fixed)]
                ours = fixed["nucleate"]
                goals += fixed_goals(*(ours.median(key) if ours.runs else None for key in ("first_s", "import_s")))
                continue
            measurements = _measurements(part, size, root, chosen, idle_s)
            taken = take_in_states(measurements, states, runs, what=f"load {size} {part}")
            series |= flat(part, taken)
            expected = {"weights": Files(root, size, "bf16").weights(), "buffers": "True"}
            texts.append(
                f"### {millions(num_parameters(SHAPES[size]))} parameters in {NUM_SHARDS} files: {_TITLES[part]}"
            )
            texts.append(_table(taken, expected, states))
            # It takes long, and what is measured is not to be lost when it is interrupted.
            print(texts[-1], file=sys.stderr, flush=True)
            faults += _faults(part, taken, expected)
            goals += LOAD_GOALS[part](Ratios(taken, states))
    return Section("\n\n".join([*texts, goals_table(goals)]), series, faults)


def _measurements(part: str, size: str, root: Path, chosen: set[str], idle_s: float) -> dict[str, Measure]:
    dtype = "fp32" if part == "fp32" else "bf16"
    where = ("--files", str(root), "--size", size, "--dtype", dtype, "--idle-s", str(idle_s))
    measurements: dict[str, Measure] = {}
    if part == "cold":
        measurements["disk"] = partial(in_state, 1, "tests.bench.disk", *where)
    else:
        ranks = 2 if part == "ranks" else 1
        measurements |= touching(kept_bytes(SHAPES[size], "bf16") // ranks, ranks, idle_s)
    for name in PARTS[part]:
        if name in chosen:
            arguments = (name, *where, *(["--cold"] if part == "cold" else []))
            measurements[name] = partial(in_state, WAYS[name].ranks, "tests.bench.load", *arguments)
    return measurements


def _fixed(way: str) -> Numbers:
    in_process("-m", "tests.bench.fixed", way)  # Reads the files, which may no longer be in memory.
    return in_process("-m", "tests.bench.fixed", way)


def _table(taken: dict[str, ByState], expected: dict[str, str], states: Sequence[str]) -> str:
    heads = ["", "first use, s", *header("build + load", states, "s"), *header("CPU", states, "s")]
    heads += [*header("and first update", states, "s"), "peak anonymous, MiB", "peak RSS, MiB", "RSS / weights"]
    heads += ["holds private, MiB", "holds mapped, MiB", "weights right", "buffers right"]
    rows = []
    for name, one in taken.items():
        label = WAYS[name].label if name in WAYS else _FLOORS[name]
        if one.failure is not None:
            rows.append(failed(label, one.failure, heads))
            continue
        if name not in WAYS:
            row = [label, "", *one.seconds("load_s")]
            rows.append(row + [""] * (len(heads) - len(row)))
            continue
        rows.append(
            [
                label,
                f"{one.median('first_use_s'):.2f}",
                *one.seconds("load_s"),
                *one.numbers("cpu_s"),
                *one.seconds("ready_s"),
                *(mib(one.median(key) or 0) for key in ("peak_bytes", "rss_bytes")),
                f"{one.median('rss_over_kept'):.2f}",
                *(mib(one.median(key) or 0) for key in ("private_bytes", "mapped_bytes")),
                *("yes" if one.every(key, expected[key]) else "**no**" for key in ("weights", "buffers")),
            ]
        )
    return table(heads, rows)


def _fixed_table(taken: dict[str, Series]) -> str:
    rows = []
    for name, one in taken.items():
        if one.failure is not None:
            rows.append([_FIXED[name], f"does not run: {escaped(one.failure)}", "", ""])
            continue
        rows.append([_FIXED[name], *(seconds(one.values(key)) for key in ("import_s", "first_s", "again_s"))])
    return table(["", "import, s", "first model, s", "second model, s"], rows)


def _faults(part: str, taken: dict[str, ByState], expected: dict[str, str]) -> list[str]:
    faults = []
    for name, one in taken.items():
        if name not in WAYS or not WAYS[name].ours:
            continue
        if one.failure is not None:
            faults.append(f"load {part} {name}: {one.failure}")
        faults += [
            f"load {part} {name}: the {key} are wrong" for key, value in expected.items() if not one.every(key, value)
        ]
    return faults
