"""The section on loading: what is measured for each of its tables, and the goals that come of them."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench.checkpoint_files import NUM_SHARDS, SHAPES, Files, num_parameters
from tests.bench.load import WAYS
from tests.bench.measure import Numbers, Series, in_process, on_ranks, take
from tests.bench.sections import Section, escaped, millions, seconds, table

MIB = 2**20

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


@dataclass(frozen=True)
class Goal:
    """What a number is to be, and what it is.

    Attributes:
        text: The number in words.
        value: What was measured; None: it was not.
        limit: What it is to be at most.
        at_least: It is to be this at least instead.
    """

    text: str
    value: float | None
    limit: float
    at_least: bool = False

    @property
    def is_met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def row(self) -> list[str]:
        measured = "" if self.value is None else f"{self.value:.3g}"
        met = {None: "not measured", True: "met", False: "**not met**"}[self.is_met]
        return [self.text, f"{'≥' if self.at_least else '≤'} {self.limit:.3g}", measured, met]


def load(
    size: str, runs: int, parts: Sequence[str] = tuple(PARTS), ways: Iterable[str] = WAYS, root: Path | None = None
) -> Section:
    """Measure how a checkpoint is loaded, in every way.

    Args:
        size: Which of `SHAPES`.
        runs: Fresh processes for each number.
        parts: Which of `PARTS`.
        ways: Which of `WAYS`.
        root: Where the files are made, or found; by default a temporary folder.
    """
    texts: list[str] = []
    series: dict[str, Series] = {}
    faults: list[str] = []
    chosen = set(ways)
    with tempfile.TemporaryDirectory() if root is None else nullcontext(root) as folder:
        root = Path(folder)
        if set(parts) - {"fixed"}:
            for each in ("micro", size):
                in_process("-m", "tests.bench.checkpoint_files", str(root), each)
        for part in parts:
            measurements = _measurements(part, size, root, chosen)
            taken = take(measurements, runs, what=f"load {size} {part}")
            series |= {f"{part} {name}": one for name, one in taken.items()}
            if part == "fixed":
                texts += [f"### {_TITLES[part]}", _fixed_table(taken)]
                continue
            expected = {"weights": Files(root, size, "bf16").weights(), "buffers": "True"}
            texts.append(
                f"### {millions(num_parameters(SHAPES[size]))} parameters in {NUM_SHARDS} files: {_TITLES[part]}"
            )
            texts.append(_table(taken, expected))
            # It takes long, and what is measured is not to be lost when it is interrupted.
            print(texts[-1], file=sys.stderr, flush=True)
            faults += _faults(part, taken, expected)
    goals = [goal for part in parts for goal in _GOALS[part](Ratios(series, part))]
    texts += ["### Goals", table(["", "goal", "measured", ""], [goal.row() for goal in goals])]
    return Section("\n\n".join(texts), series, faults)


@dataclass(frozen=True)
class Ratios:
    """Medians of one table, and their ratios; None where something was not measured."""

    series: dict[str, Series]
    part: str

    def of(self, way: str, key: str = "load_s") -> float | None:
        one = self.series.get(f"{self.part} {way}")
        if one is None or one.failure is not None or not one.runs or None in one.values(key):
            return None
        return one.median(key)

    def over(self, way: str, peer: str, key: str = "load_s", peer_key: str | None = None) -> float | None:
        ours, theirs = self.of(way, key), self.of(peer, peer_key or key)
        return None if ours is None or theirs is None else ours / theirs

    def peak_over_limit(self, way: str) -> float | None:
        """Return the peak of anonymous memory over what is kept, 8 MiB for each thread and 16 MiB."""
        peak, kept, threads = (self.of(way, key) for key in ("peak_bytes", "kept_bytes", "threads"))
        if peak is None or kept is None or threads is None:
            return None
        return peak / (kept + threads * 8 * MIB + 16 * MIB)


def _bf16_goals(ratios: Ratios) -> list[Goal]:
    peers = {
        "safe-open": ("`safe_open` and copy", 0.5),
        "dcp": ("DCP's reader", 0.45),
        "accelerate": ("Accelerate's `load_checkpoint_and_dispatch`", 0.2),
        "accelerate-in-model": ("Accelerate's `load_checkpoint_in_model`", 0.2),
        "fabric": ("Fabric's `load_raw`", 0.2),
    }
    goals = [
        Goal(f"bf16 into private memory, time of {name}", ratios.over("nucleate", way), limit)
        for way, (name, limit) in peers.items()
    ]
    return [
        *goals,
        Goal("load and first update, time of transformers", ratios.over("nucleate", "transformers", "ready_s"), 0.15),
        Goal("aliasing, time of transformers", ratios.over("nucleate-mmap", "transformers"), 0.6),
        Goal("peak of anonymous memory, of weights + 8 MiB a thread + 16 MiB", ratios.peak_over_limit("nucleate"), 1.0),
    ]


def _fp32_goals(ratios: Ratios) -> list[Goal]:
    return [
        Goal("fp32 to bf16, time of transformers", ratios.over("nucleate", "transformers"), 0.65),
        Goal("fp32 to bf16, peak RSS of transformers", ratios.over("nucleate", "transformers", "rss_bytes"), 0.35),
        Goal(
            "fp32 to bf16, peak of anonymous memory, of weights + 8 MiB a thread + 16 MiB",
            ratios.peak_over_limit("nucleate"),
            1.0,
        ),
    ]


def _cold_goals(ratios: Ratios) -> list[Goal]:
    return [Goal("not in memory, the disk's sequential rate", ratios.over("disk", "nucleate"), 0.9, at_least=True)]


def _ranks_goals(ratios: Ratios) -> list[Goal]:
    return [
        Goal("2 FSDP ranks, time of DCP's reader", ratios.over("nucleate-fsdp", "dcp-ranks"), 0.6),
        Goal("2 FSDP ranks, time of Fabric's `load_raw`", ratios.over("nucleate-fsdp", "fabric-ranks"), 0.2),
        Goal(
            "2 FSDP ranks, each rank's peak RSS over its base, of its shard",
            ratios.of("nucleate-fsdp", "rss_over_kept"),
            1.05,
        ),
    ]


def _fixed_goals(ratios: Ratios) -> list[Goal]:
    first_s, import_s = ratios.of("nucleate", "first_s"), ratios.of("nucleate", "import_s")
    both = None if first_s is None or import_s is None else first_s + import_s
    return [
        Goal("a model without values, first use, ms", None if first_s is None else first_s * 1e3, 30),
        Goal("the same and the import, ms", None if both is None else both * 1e3, 30),
    ]


_GOALS: dict[str, Callable[[Ratios], list[Goal]]] = {
    "bf16": _bf16_goals,
    "fp32": _fp32_goals,
    "cold": _cold_goals,
    "ranks": _ranks_goals,
    "fixed": _fixed_goals,
}


def _measurements(part: str, size: str, root: Path, chosen: set[str]) -> dict[str, Callable[[], Numbers]]:
    if part == "fixed":
        return {name: partial(_fixed, name) for name in _FIXED}
    dtype = "fp32" if part == "fp32" else "bf16"
    where = ("--files", str(root), "--size", size, "--dtype", dtype)
    measurements: dict[str, Callable[[], Numbers]] = {}
    if part == "cold":
        measurements["disk"] = partial(in_process, "-m", "tests.bench.disk", *where)
    for name in PARTS[part]:
        if name not in chosen:
            continue
        arguments = (name, *where, *(["--cold"] if part == "cold" else []))
        if WAYS[name].ranks == 1:
            measurements[name] = partial(in_process, "-m", "tests.bench.load", *arguments)
        else:
            measurements[name] = partial(on_ranks, "tests.bench.load", WAYS[name].ranks, *arguments)
    return measurements


def _fixed(way: str) -> Numbers:
    in_process("-m", "tests.bench.fixed", way)  # Reads the files, which may no longer be in memory.
    return in_process("-m", "tests.bench.fixed", way)


def _table(taken: dict[str, Series], expected: dict[str, str]) -> str:
    header = [
        "",
        "first use, s",
        "build + load, s",
        "CPU, s",
        "and first update, s",
        "peak anonymous, MiB",
        "peak RSS, MiB",
    ]
    header += ["RSS / weights", "weights right", "buffers right"]
    rows = []
    for name, one in taken.items():
        label = WAYS[name].label if name in WAYS else "the disk: the same files, one after the other in blocks of 8 MiB"
        if one.failure is not None:
            rows.append([label, f"does not run: {escaped(one.failure)}", *[""] * 8])
            continue
        if name not in WAYS:
            rows.append([label, "", seconds(one.values("load_s")), *[""] * 7])
            continue
        rows.append(
            [
                label,
                f"{one.median('first_use_s'):.2f}",
                seconds(one.values("load_s")),
                f"{one.median('cpu_s'):.2f}",
                "" if WAYS[name].frozen else seconds(one.values("ready_s")),
                f"{one.median('peak_bytes') / MIB:.0f}",
                f"{one.median('rss_bytes') / MIB:.0f}",
                f"{one.median('rss_over_kept'):.2f}",
                *("yes" if one.every(key, expected[key]) else "**no**" for key in ("weights", "buffers")),
            ]
        )
    return table(header, rows)


def _fixed_table(taken: dict[str, Series]) -> str:
    rows = []
    for name, one in taken.items():
        if one.failure is not None:
            rows.append([_FIXED[name], f"does not run: {escaped(one.failure)}", "", ""])
            continue
        rows.append([_FIXED[name], *(seconds(one.values(key)) for key in ("import_s", "first_s", "again_s"))])
    return table(["", "import, s", "first model, s", "second model, s"], rows)


def _faults(part: str, taken: dict[str, Series], expected: dict[str, str]) -> list[str]:
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
