"""The section on quantizing while loading: nucleate beside transformers, and the goals that come of it."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from tests.bench.checkpoint_files import NUM_SHARDS, SHAPES, num_parameters
from tests.bench.load_section import MIB, Goal
from tests.bench.measure import Series, in_process, take
from tests.bench.quantize import MODES, WAYS
from tests.bench.sections import Section, escaped, millions, seconds, table

_LABELS = {
    "nucleate": "nucleate `load_raw`, `BitsandbytesPrecision`",
    "transformers": "transformers `from_pretrained`, `BitsAndBytesConfig`",
}
#: What nucleate's is to be at most, of transformers': the time and the peak of resident memory.
_LIMITS = {"int8": (0.2, 0.4), "nf4": (0.15, 0.35)}
_PARTS = ("codes", "scales", "rest")


def quantize(size: str, runs: int, root: Path | None = None) -> Section:
    """Measure how a checkpoint is loaded into quantized layers.

    Args:
        size: Which of `SHAPES`.
        runs: Fresh processes for each number.
        root: Where the files are made, or found; by default a temporary folder.
    """
    texts: list[str] = []
    series: dict[str, Series] = {}
    faults: list[str] = []
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory() if root is None else nullcontext(root) as folder:
        for each in ("micro", size):
            in_process("-m", "tests.bench.checkpoint_files", str(folder), each)
        for mode in MODES:
            where = (mode, "--files", str(folder), "--size", size)
            taken = take(
                {way: partial(in_process, "-m", "tests.bench.quantize", way, *where) for way in WAYS},
                runs,
                what=f"quantize {size} {mode}",
            )
            series |= {f"{mode} {way}": one for way, one in taken.items()}
            texts.append(f"### {millions(num_parameters(SHAPES[size]))} parameters in {NUM_SHARDS} bf16 files: {mode}")
            texts.append(_table(taken))
            goals += _goals(mode, taken)
            faults += [f"quantize {mode}: {fault}" for fault in _faults(taken)]
    texts += ["### Goals", table(["", "goal", "measured", ""], [goal.row() for goal in goals])]
    return Section("\n\n".join(texts), series, faults)


def _table(taken: dict[str, Series]) -> str:
    header = ["", "first use, s", "load + quantize, s", "CPU, s", "peak anonymous, MiB", "peak RSS, MiB", "kept, MiB"]
    header += [f"{part} equal" for part in _PARTS]
    rows = []
    for way, one in taken.items():
        if one.failure is not None:
            rows.append([_LABELS[way], f"does not run: {escaped(one.failure)}", *[""] * 8])
            continue
        rows.append(
            [
                _LABELS[way],
                f"{one.median('first_use_s'):.2f}",
                seconds(one.values("load_s")),
                f"{one.median('cpu_s'):.2f}",
                *(f"{one.median(key) / MIB:.0f}" for key in ("peak_bytes", "rss_bytes", "kept_bytes")),
                *("" if way == "transformers" else _equal(taken, part) for part in _PARTS),
            ]
        )
    return table(header, rows)


def _equal(taken: dict[str, Series], part: str) -> str:
    ours, theirs = taken["nucleate"], taken["transformers"]
    if theirs.failure is not None:
        return "?"
    expected = theirs.values(part)[0]
    return "yes" if ours.every(part, expected) and theirs.every(part, expected) else "**no**"


def _goals(mode: str, taken: dict[str, Series]) -> list[Goal]:
    def ratio(key: str) -> float | None:
        if any(one.failure is not None for one in taken.values()):
            return None
        return taken["nucleate"].median(key) / taken["transformers"].median(key)

    time_limit, memory_limit = _LIMITS[mode]
    return [
        Goal(f"{mode}, time of transformers", ratio("load_s"), time_limit),
        Goal(f"{mode}, peak RSS of transformers", ratio("rss_bytes"), memory_limit),
    ]


def _faults(taken: dict[str, Series]) -> list[str]:
    faults = [f"{way}: {one.failure}" for way, one in taken.items() if one.failure is not None]
    if not faults:
        faults += [f"the {part} differ" for part in _PARTS if _equal(taken, part) != "yes"]
        if 0 in taken["nucleate"].values("num_quantized"):
            faults.append("nothing is quantized")
    return faults
