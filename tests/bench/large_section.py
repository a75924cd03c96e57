"""The section on a large checkpoint that comes from the disk: its measurements, its floors, and its goals."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from tests.bench.by_state import ByState, Measure, flat, header, of, take_in_states
from tests.bench.checkpoint_files import SHAPES, Files, kept_bytes, num_parameters
from tests.bench.goal import Goal, goals_table, ratio
from tests.bench.large import WAYS
from tests.bench.large_files import NUM_SHARDS, large_files
from tests.bench.markdown import failed, mib, millions, table
from tests.bench.measure import Numbers, in_process, on_ranks
from tests.bench.section import Section
from tests.bench.state import UNTOUCHED

#: The host takes 100 to 200 MiB a second back, and a process before has left 13 GB.
IDLE_S = 60.0
#: As many reads at once keep the disk busy; more gain nothing on the machine of the docs.
NUM_READERS = 4
NUM_TOUCHERS = 2
_READS = {
    "read-direct": "bare reading, past the page cache",
    "read-buffered": "bare reading, through the page cache",
}
_TOUCH = "touch-"
_TIMEOUT_S = 1800
#: What the goals call a way, and the most that it may take of the larger of bare reading and bare touching.
_LIMITS = {
    "nucleate": ("bf16", 1.2),
    "nucleate-fsdp": ("bf16, 2 FSDP ranks", 1.2),
    "nucleate-int8": ("int8", 1.5),
    "nucleate-nf4": ("nf4", 1.5),
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
        states: The states of memory in which loading begins.
        idle_s: How long nothing runs before untouched memory is measured.
    """
    chosen = set(ways)
    with tempfile.TemporaryDirectory() if root is None else nullcontext(root) as folder:
        root = Path(folder)
        for each in ("micro", size):
            in_process("-m", "tests.bench.large_files", str(root), each, timeout_s=_TIMEOUT_S)
        files = large_files(root, size)
        measurements = _measurements(root, files, [name for name in WAYS if name in chosen], idle_s)
        taken = take_in_states(measurements, states, runs, what=f"large {size}")
        expected = files.weights()
    heading = (
        f"### {millions(num_parameters(SHAPES[size]))} parameters in {NUM_SHARDS} bf16 files that are not in memory"
    )
    text = _table(taken, expected, states)
    # It takes long, and what is measured is not to be lost when a later section fails.
    print(text, file=sys.stderr, flush=True)
    goals = [goal for state in states for goal in _goals(taken, state)]
    faults = [f"large {fault}" for fault in _faults(taken, expected, size)]
    return Section("\n\n".join([heading, text, goals_table(goals)]), flat("", taken), faults)


def floor_s(taken: Mapping[str, ByState], form: str, state: str) -> float | None:
    """Return the larger of bare reading, by the faster way, and bare touching of what is kept in that form."""
    reads = [each for each in (of(taken, name, "load_s", state) for name in _READS) if each is not None]
    touch = of(taken, f"{_TOUCH}{form}", "load_s", state)
    return None if not reads or touch is None else max(min(reads), touch)


def _measurements(root: Path, files: Files, names: Sequence[str], idle_s: float) -> dict[str, Measure]:
    """Return what is measured; each floor stands before the ways that it is for."""
    idle = ("--idle-s", str(idle_s), "--state")
    # Those that only touch memory drop the files as well: a loader does not find memory full of them either.
    paths = ("--paths", *map(str, files.shards))
    reading = (*paths, "--threads", str(NUM_READERS), *idle)
    measurements: dict[str, Measure] = {
        read: partial(_in_process, "tests.bench.bare", read, *reading) for read in _READS
    }
    for name in names:
        way = WAYS[name]
        touch = f"{_TOUCH}{way.kept}"
        if touch not in measurements:
            count = kept_bytes(SHAPES[files.size], way.kept)
            touching = ("touch", "--bytes", str(count), *paths, "--threads", str(NUM_TOUCHERS), *idle)
            measurements[touch] = partial(_in_process, "tests.bench.bare", *touching)
        loading = (name, "--files", str(root), "--size", files.size, *idle)
        # As torchrun starts ranks by default: with one thread each.
        start = _in_process if way.ranks == 1 else partial(_on_ranks, way.ranks)
        measurements[name] = partial(start, "tests.bench.large", *loading)
    return measurements


def _in_process(module: str, *arguments: str) -> Numbers:
    return in_process("-m", module, *arguments, timeout_s=_TIMEOUT_S)


def _on_ranks(ranks: int, module: str, *arguments: str) -> Numbers:
    return on_ranks(module, ranks, *arguments, timeout_s=_TIMEOUT_S)


def _table(taken: Mapping[str, ByState], expected: str, states: Sequence[str]) -> str:
    heads = ["", "first use, s", *header("load", states, "s"), *header("and two tokens", states, "s")]
    heads += [*header("x floor", states), *header("CPU", states, "s"), "peak anonymous, MiB"]
    heads += ["page cache grew by, MiB", "holds private, MiB", "holds mapped, MiB", "weights right"]
    none = [""] * len(states)
    rows = []
    for name, one in taken.items():
        if one.failure is not None:
            rows.append(failed(_label(name), one.failure, heads))
            continue
        cpu, grown = one.numbers("cpu_s", 1), mib(one.median("cached_bytes") or 0)
        if name not in WAYS:
            rows.append([_label(name), "", *one.seconds("load_s"), *none, *none, *cpu, "", grown, "", "", ""])
            continue
        way = WAYS[name]
        rows.append(
            [
                _label(name),
                f"{one.median('first_use_s'):.2f}",
                *one.seconds("load_s"),
                *(one.seconds("all_s") if way.tokens else none),
                # The floor is that of filling a model, not of using one.
                *(none if way.tokens else [_times(_over_floor(taken, name, state)) for state in states]),
                *cpu,
                mib(one.median("peak_bytes") or 0),
                grown,
                *(mib(one.median(key) or 0) for key in ("private_bytes", "mapped_bytes")),
                "" if way.kept != "bf16" else "yes" if one.every("weights", expected) else "**no**",
            ]
        )
    return table(heads, rows)


def _over_floor(taken: Mapping[str, ByState], name: str, state: str) -> float | None:
    return ratio(of(taken, name, "load_s", state), floor_s(taken, WAYS[name].kept, state))


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _label(name: str) -> str:
    if name in WAYS:
        ranks = WAYS[name].ranks
        return WAYS[name].label if ranks == 1 else f"{ranks} ranks: {WAYS[name].label}"
    return _READS.get(name) or f"bare touching of what is kept: {name.removeprefix(_TOUCH)}"


def _goals(taken: Mapping[str, ByState], state: str) -> list[Goal]:
    goals = [
        Goal(
            f"{name}, {state}, time of the larger of bare reading and bare touching",
            _over_floor(taken, way, state),
            limit,
        )
        for way, (name, limit) in _LIMITS.items()
    ]
    second = ratio(of(taken, "nucleate-mmap", "all_s", state), of(taken, "transformers", "all_s", state))
    return [*goals, Goal(f"second token with `mmap=True`, {state}, time of transformers", second, 1.0)]


def _faults(taken: Mapping[str, ByState], expected: str, size: str) -> list[str]:
    faults = []
    for name, one in taken.items():
        if name not in WAYS or not WAYS[name].ours:
            continue
        if one.failure is not None:
            faults.append(f"{name}: {one.failure}")
        elif WAYS[name].kept == "bf16":
            faults += [] if one.every("weights", expected) else [f"{name}: the weights are wrong"]
        elif not one.every("num_quantized", 7 * SHAPES[size].num_layers):
            faults.append(f"{name}: not every linear layer is quantized")
    tokens = [
        run["tokens"] for name in ("nucleate-mmap", "transformers") if name in taken for run in taken[name].pooled.runs
    ]
    if len(set(tokens)) > 1:
        faults.append("nucleate-mmap: the tokens are not those of transformers")
    return faults
