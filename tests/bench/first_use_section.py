"""The section on first use: a Llama in a fresh process, imports included, and the goal for it."""

from __future__ import annotations

import tempfile
from functools import partial

from tests.bench.checkpoint_files import SHAPES, num_parameters
from tests.bench.first_use import WAYS
from tests.bench.load_section import Goal
from tests.bench.measure import Numbers, Series, in_process, take
from tests.bench.sections import Section, escaped, millions, seconds, table

_LABELS = {
    "eager": "eager torch",
    "meta": '`torch.device("meta")`: no values',
    "nucleate": "nucleate, `init_module(empty_init=True)` + `setup`",
}
IMPORTS_ALLOWED = 1.1
CONSTRUCTION_ALLOWED = 0.35


def first_use(size: str, runs: int, idle_s: float = 4.0) -> Section:
    """Measure the first and the second Llama of a fresh process, in every way.

    Args:
        size: Which of the shapes of the loading benchmark.
        runs: Fresh processes for each number.
        idle_s: How long each process waits before it begins.
    """
    with tempfile.TemporaryDirectory() as bytecode:
        for way in WAYS:
            # Compiles what is not compiled, and reads all files once.
            _measure(way, "micro", 0.0, bytecode)
        measurements = {way: partial(_measure, way, size, idle_s, bytecode) for way in WAYS}
        taken = take(measurements, runs, what=f"first-use {size}")
    text = "\n\n".join(
        [
            f"### A Llama of {millions(num_parameters(SHAPES[size]))} parameters in fp32, in a fresh process",
            _table(taken),
            table(["", "goal", "measured", ""], [_goal(taken).row()]),
        ]
    )
    return Section(text, taken, _faults(taken))


def _measure(way: str, size: str, idle_s: float, bytecode: str) -> Numbers:
    return in_process(
        "-m", "tests.bench.first_use", way, "--size", size, "--idle-s", str(idle_s), "--bytecode", bytecode
    )


def _table(taken: dict[str, Series]) -> str:
    header = ["", "import, s", "CPU, s", "first, s", "CPU, s", "second, s", "CPU, s", "weights = eager's"]
    expected = taken["eager"].runs[0]["first_weights"] if taken["eager"].runs else None
    rows = []
    for way, one in taken.items():
        if one.failure is not None:
            rows.append([_LABELS[way], f"failed: {escaped(one.failure)}", *[""] * 6])
            continue
        cells = [_LABELS[way]]
        for name in ("import", "first", "second"):
            cells += [seconds(one.values(f"{name}_s")), f"{one.median(f'{name}_cpu_s'):.2f}"]
        rows.append([*cells, "" if way == "meta" else "yes" if _has_weights(one, expected) else "**no**"])
    return table(header, rows)


def _goal(taken: dict[str, Series]) -> Goal:
    eager, ours = taken["eager"], taken["nucleate"]
    value = None
    if eager.runs and ours.runs:
        allowed = IMPORTS_ALLOWED * eager.median("import_s") + CONSTRUCTION_ALLOWED * eager.median("first_s")
        value = (ours.median("import_s") + ours.median("first_s")) / allowed
    text = (
        f"nucleate's import and first model, over {IMPORTS_ALLOWED} x eager's import + {CONSTRUCTION_ALLOWED} x "
        "eager's first model"
    )
    return Goal(text, value, 1.0)


def _has_weights(one: Series, expected: str | None) -> bool:
    return all(one.every(f"{name}_weights", expected) for name in ("first", "second"))


def _faults(taken: dict[str, Series]) -> list[str]:
    faults = [f"first-use {way}: {one.failure}" for way, one in taken.items() if one.failure is not None]
    eager, ours = taken["eager"], taken["nucleate"]
    if eager.runs and ours.runs and not _has_weights(ours, eager.runs[0]["first_weights"]):
        faults.append("first-use nucleate: the weights are not eager's")
    return faults
