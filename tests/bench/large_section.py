"""The section on a large checkpoint that comes from the disk: its measurements, its floors, and its goals."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench.checkpoint_files import SHAPES, Files, num_parameters
from tests.bench.large import WAYS
from tests.bench.large_files import NUM_SHARDS, large_files
from tests.bench.load_section import MIB, Goal
from tests.bench.measure import Numbers, Series, in_process, on_ranks, take
from tests.bench.sections import Section, escaped, millions, seconds, table
from tests.bench.state import IDLE_S, UNTOUCHED

#: As many reads at once keep the disk busy; more gain nothing on the machine of the docs.
NUM_READERS = 4
NUM_TOUCHERS = 2
_READS = {
    "read-direct": "bare reading, past the page cache",
    "read-buffered": "bare reading, through the page cache",
}
_TOUCH = "touch-"
_TIMEOUT_S = 1800
#: The most that a way may take, of the larger of bare reading and bare touching.
_LIMITS = {"nucleate": 1.2, "nucleate-fsdp": 1.2, "nucleate-int8": 1.5, "nucleate-nf4": 1.5}
_NAMES = {
    "nucleate": "bf16",
    "nucleate-fsdp": "bf16, 2 FSDP ranks",
    "nucleate-int8": "int8",
    "nucleate-nf4": "nf4",
}


def large(
    size: str,
    runs: int,
    ways: Iterable[str] = WAYS,
    root: Path | None = None,
    states: Sequence[str] = (UNTOUCHED,),
    idle_s: float = IDLE_S,
) -> Section:
    """Measure how a checkpoint is loaded that is not in memory, beside the floors of the machine.

    Args:
        size: Which of `SHAPES`.
        runs: Fresh processes for each number.
        ways: Which of `WAYS`.
        root: The folder in which the files are made, or found; by default a temporary folder.
        states: Which of the states of memory.
        idle_s: How long nothing runs before untouched memory is measured.
    """
    chosen = set(ways)
    with tempfile.TemporaryDirectory() if root is None else nullcontext(root) as folder:
        root = Path(folder)
        for each in ("micro", size):
            in_process("-m", "tests.bench.large_files", str(root), each, timeout_s=_TIMEOUT_S)
        files = large_files(root, size)
        order = [name for name in WAYS if name in chosen]
        measurements = {
            f"{name} {state}": measure
            for name, make in _measurements(root, files, order, idle_s).items()
            for state in states
            for measure in [partial(make, state)]
        }
        taken = take(measurements, runs, what=f"large {size}")
        expected = files.weights()
    texts: list[str] = []
    faults: list[str] = []
    goals: list[Goal] = []
    for state in states:
        of_state = Ratios({name.split()[0]: one for name, one in taken.items() if name.endswith(f" {state}")})
        texts.append(
            f"### {millions(num_parameters(SHAPES[size]))} parameters in {NUM_SHARDS} bf16 files on the disk: "
            f"free memory {state}"
        )
        texts.append(_table(of_state, expected))
        faults += [f"large {state} {fault}" for fault in _faults(of_state, expected, size)]
        goals += _goals(of_state, state)
    texts += ["### Goals", table(["", "goal", "measured", ""], [goal.row() for goal in goals])]
    return Section("\n\n".join(texts), taken, faults)


@dataclass(frozen=True)
class Ratios:
    """The medians of one state, and their ratios; None where something was not measured."""

    series: dict[str, Series]

    def of(self, name: str, key: str = "load_s") -> float | None:
        one = self.series.get(name)
        return None if one is None or not one.runs else one.median(key)

    def floor_s(self, kept: str) -> float | None:
        """Return the larger of bare reading, by the faster way, and bare touching."""
        reads = [each for each in map(self.of, _READS) if each is not None]
        touch = self.of(f"{_TOUCH}{kept}")
        return None if not reads or touch is None else max(min(reads), touch)

    def over_floor(self, name: str) -> float | None:
        value, floor = self.of(name, "all_s"), self.floor_s(WAYS[name].kept)
        return None if value is None or floor is None else value / floor


def kept_bytes(size: str, kept: str) -> int:
    """Return about how many bytes a model keeps, without making it."""
    shape = SHAPES[size]
    parameters = num_parameters(shape)
    # Neither the embedding nor the head nor norms are quantized.
    rest = 2 * shape.vocab_size * shape.dim + (2 * shape.num_layers + 1) * shape.dim
    # With scales: 4 bytes for each row, and 4 bytes for each 64 elements.
    per_element = {"bf16": 2.0, "int8": 1.0 + 4 / shape.dim, "nf4": 0.5 + 4 / 64}[kept]
    return int((parameters - rest) * per_element) + 2 * rest


def _measurements(root: Path, files: Files, names: Sequence[str], idle_s: float) -> dict[str, Callable[[str], Numbers]]:
    """Return name to a function that measures in a state; each floor stands before the ways that it is for."""
    measurements: dict[str, Callable[[str], Numbers]] = {}
    idle = ("--idle-s", str(idle_s))
    paths = ("--paths", *map(str, files.shards), "--threads", str(NUM_READERS))
    for read in _READS:
        measurements[read] = lambda state, read=read: _bare(read, *paths, "--state", state, *idle)  # type: ignore[misc]
    for name in names:
        way = WAYS[name]
        if f"{_TOUCH}{way.kept}" not in measurements:
            count = kept_bytes(files.size, way.kept)
            touch = ("--bytes", str(count), "--threads", str(NUM_TOUCHERS))
            measurements[f"{_TOUCH}{way.kept}"] = lambda state, touch=touch: _bare(  # type: ignore[misc]
                "touch", *touch, "--state", state, *idle
            )
        arguments = (name, "--files", str(root), "--size", files.size, *idle, "--state")
        measurements[name] = lambda state, name=name, arguments=arguments: _load(name, *arguments, state)  # type: ignore[misc]
    return measurements


def _bare(*arguments: str) -> Numbers:
    return in_process("-m", "tests.bench.bare", *arguments, timeout_s=_TIMEOUT_S)


def _load(name: str, *arguments: str) -> Numbers:
    if WAYS[name].ranks == 1:
        return in_process("-m", "tests.bench.large", *arguments, timeout_s=_TIMEOUT_S)
    # As torchrun starts ranks by default: with one thread each.
    return on_ranks("tests.bench.large", WAYS[name].ranks, *arguments, timeout_s=_TIMEOUT_S)


def _table(ratios: Ratios, expected: str) -> str:
    header = ["", "first use, s", "load, s", "and two tokens, s", "x floor", "CPU, s", "peak anonymous, MiB"]
    header += ["page cache grew by, MiB", "keeps private, MiB", "keeps mapped, MiB", "weights right"]
    rows = []
    for name, one in ratios.series.items():
        label = _label(name)
        if one.failure is not None:
            rows.append([label, f"does not run: {escaped(one.failure)}", *[""] * 9])
            continue
        cpu, grown = f"{one.median('cpu_s'):.1f}", f"{one.median('cached_bytes') / MIB:.0f}"
        if name not in WAYS:
            rows.append([label, "", seconds(one.values("load_s")), "", "", cpu, "", grown, "", "", ""])
            continue
        # The floor is that of filling a model, not of using one.
        over = None if WAYS[name].tokens else ratios.over_floor(name)
        right = "" if WAYS[name].kept != "bf16" else "yes" if one.every("weights", expected) else "**no**"
        rows.append(
            [
                label,
                f"{one.median('first_use_s'):.2f}",
                seconds(one.values("load_s")),
                seconds(one.values("all_s")) if WAYS[name].tokens else "",
                "" if over is None else f"{over:.2f}",
                cpu,
                f"{one.median('peak_bytes') / MIB:.0f}",
                grown,
                *(f"{one.median(key) / MIB:.0f}" for key in ("private_bytes", "mapped_bytes")),
                right,
            ]
        )
    text = table(header, rows)
    # It takes long, and what is measured is not to be lost when it is interrupted.
    print(text, file=sys.stderr, flush=True)
    return text


def _label(name: str) -> str:
    if name in WAYS:
        ranks = WAYS[name].ranks
        return WAYS[name].label if ranks == 1 else f"{ranks} ranks: {WAYS[name].label}"
    return _READS.get(name) or f"bare touching of what is kept: {name.removeprefix(_TOUCH)}"


def _goals(ratios: Ratios, state: str) -> list[Goal]:
    goals = [
        Goal(f"{name}, {state}, time of the larger of bare reading and bare touching", ratios.over_floor(way), limit)
        for way, limit in _LIMITS.items()
        for name in [_NAMES[way]]
    ]
    ours, theirs = ratios.of("nucleate-mmap", "all_s"), ratios.of("transformers", "all_s")
    second = None if ours is None or theirs is None else ours / theirs
    return [*goals, Goal(f"second token with `mmap=True`, {state}, time of transformers", second, 1.0)]


def _faults(ratios: Ratios, expected: str, size: str) -> list[str]:
    faults = []
    for name, one in ratios.series.items():
        if name not in WAYS or not WAYS[name].ours:
            continue
        if one.failure is not None:
            faults.append(f"{name}: {one.failure}")
        elif WAYS[name].kept == "bf16":
            faults += [] if one.every("weights", expected) else [f"{name}: the weights are wrong"]
        elif not one.every("num_quantized", 7 * SHAPES[size].num_layers):
            faults.append(f"{name}: not every linear layer is quantized")
    ours, theirs = (ratios.series.get(name) for name in ("nucleate-mmap", "transformers"))
    if ours and theirs and ours.runs and theirs.runs and not ours.every("tokens", theirs.values("tokens")[0]):
        faults.append("nucleate-mmap: the tokens are not those of transformers")
    return faults
