"""The section on quantizing while loading: nucleate beside transformers, and the goals that come of it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from tests.bench.by_state import ByState, Measure, flat, header, take_in_states
from tests.bench.checkpoint_files import NUM_SHARDS, SHAPES, kept_bytes, num_parameters
from tests.bench.floors import TOUCHES, touching
from tests.bench.goal import Goal, goals_table
from tests.bench.load_goals import Ratios, quantize_goals
from tests.bench.markdown import failed, mib, millions, table
from tests.bench.measure import Series, in_process
from tests.bench.quantize import MODES, WAYS
from tests.bench.section import Section
from tests.bench.state import IDLE_S, STATES

_LABELS = {
    **TOUCHES,
    "nucleate": "nucleate `load_raw`, `BitsandbytesPrecision`",
    "transformers": "transformers `from_pretrained`, `BitsAndBytesConfig`",
}
_PARTS = ("codes", "scales", "rest")


def quantize(
    size: str, runs: int, root: Path | None = None, states: Sequence[str] = STATES, idle_s: float = IDLE_S
) -> Section:
    """Measure how a checkpoint is loaded into quantized layers.

    Args:
        size: Which of `SHAPES`.
        runs: Fresh processes for each number.
        root: Where the files are made, or found; by default a temporary folder.
        states: The states of memory in which loading begins.
        idle_s: How long nothing runs before untouched memory is measured.
    """
    texts: list[str] = []
    series: dict[str, Series] = {}
    faults: list[str] = []
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory() if root is None else nullcontext(root) as folder:
        for each in ("micro", size):
            in_process("-m", "tests.bench.checkpoint_files", str(folder), each)
        for mode in MODES:
            where = (mode, "--files", str(folder), "--size", size, "--idle-s", str(idle_s), "--state")
            measurements: dict[str, Measure] = touching(kept_bytes(SHAPES[size], mode), 1, idle_s)
            measurements |= {way: partial(in_process, "-m", "tests.bench.quantize", way, *where) for way in WAYS}
            taken = take_in_states(measurements, states, runs, what=f"quantize {size} {mode}")
            series |= flat(mode, taken)
            texts.append(f"### {millions(num_parameters(SHAPES[size]))} parameters in {NUM_SHARDS} bf16 files: {mode}")
            texts.append(_table(taken, states))
            goals += quantize_goals(mode, Ratios(taken, states))
            faults += [f"quantize {mode}: {fault}" for fault in _faults(taken)]
    return Section("\n\n".join([*texts, goals_table(goals)]), series, faults)


def _table(taken: dict[str, ByState], states: Sequence[str]) -> str:
    heads = ["", "first use, s", *header("load + quantize", states, "s"), *header("CPU", states, "s")]
    heads += ["peak anonymous, MiB", "peak RSS, MiB", "kept, MiB", *(f"{part} equal" for part in _PARTS)]
    rows = []
    for way, one in taken.items():
        if one.failure is not None:
            rows.append(failed(_LABELS[way], one.failure, heads))
            continue
        if way in TOUCHES:
            row = [_LABELS[way], "", *one.seconds("load_s")]
            rows.append(row + [""] * (len(heads) - len(row)))
            continue
        rows.append(
            [
                _LABELS[way],
                f"{one.median('first_use_s'):.2f}",
                *one.seconds("load_s"),
                *one.numbers("cpu_s"),
                *(mib(one.median(key) or 0) for key in ("peak_bytes", "rss_bytes", "kept_bytes")),
                *("" if way == "transformers" else _equal(taken, part) for part in _PARTS),
            ]
        )
    return table(heads, rows)


def _equal(taken: dict[str, ByState], part: str) -> str:
    ours, theirs = taken["nucleate"], taken["transformers"]
    if theirs.failure is not None:
        return "?"
    expected = theirs.pooled.values(part)[0]
    return "yes" if ours.every(part, expected) and theirs.every(part, expected) else "**no**"


def _faults(taken: dict[str, ByState]) -> list[str]:
    faults = [f"{way}: {one.failure}" for way, one in taken.items() if one.failure is not None]
    if not faults:
        faults += [f"the {part} differ" for part in _PARTS if _equal(taken, part) != "yes"]
        if 0 in taken["nucleate"].pooled.values("num_quantized"):
            faults.append("nothing is quantized")
    return faults
