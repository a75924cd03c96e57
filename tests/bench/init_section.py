"""The section on constructing a model: what is measured, its tables, and the goals that come of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from tests.bench.by_state import ByState, flat, header, of, take_in_states
from tests.bench.construct_ways import WAYS
from tests.bench.floors import TOUCHES, touching
from tests.bench.goal import Goal, goals_table, ratio
from tests.bench.markdown import failed, mib, millions, table
from tests.bench.measure import Numbers, Series, in_process, on_ranks
from tests.bench.model import DTYPES, INITS, SIZES, num_parameters
from tests.bench.section import Section
from tests.bench.state import IDLE_S, STATES

SEED = 1

_HOW = {
    "plain": "initialized once, by torch's modules",
    "again": "initialized and then drawn again, all of them, as GPT-2 does",
    "llama": "transformers' `LlamaForCausalLM`, which initializes twice",
}
_BASELINES = {1: "eager", 2: "eager-ranks", 4: "eager-ranks-4"}
#: The most that nucleate may take, of eager's time, in either state of memory.
_LIMITS = {"fp32": 0.6, "bf16": 0.7}


def construct(
    size: str,
    runs: int,
    inits: Sequence[str] = INITS,
    ways: Iterable[str] = WAYS,
    dtypes: Sequence[str] = tuple(DTYPES),
    states: Sequence[str] = STATES,
    idle_s: float = IDLE_S,
) -> Section:
    """Measure the construction of a model, in every way.

    Args:
        size: Which of `SIZES`.
        runs: Fresh processes for each number.
        inits: Which of `INITS`.
        ways: Which of `WAYS`; eager construction is one of them.
        dtypes: Which of `DTYPES`.
        states: The states of memory in which construction begins.
        idle_s: How long nothing runs before untouched memory is measured.

    Raises:
        RuntimeError: Eager construction failed, with which everything is compared.
    """
    texts: list[str] = []
    series: dict[str, Series] = {}
    faults: list[str] = []
    goals: list[Goal] = []
    chosen = set(ways)
    for init, dtype in ((init, dtype) for init in inits for dtype in dtypes):
        num_bytes = DTYPES[dtype].itemsize * num_parameters(SIZES[size])
        taken = take_in_states(
            {name: partial(_construct, name, size, init, dtype, idle_s) for name in WAYS if name in chosen}
            | touching(num_bytes, 1, idle_s),
            states,
            runs,
            once=[name for name, way in WAYS.items() if way.once],
            what=f"construct {size} {init} {dtype}",
        )
        series |= flat(f"{init} {dtype}", taken)
        eager = taken["eager"]
        if eager.failure is not None:
            raise RuntimeError(f"eager construction failed: {eager.failure}")
        expected = {key: eager.pooled.values(key)[0] for key in ("weights", "stream")}
        texts.append(f"### {millions(num_parameters(SIZES[size]))} parameters in {dtype}, {_HOW[init]}")
        for ranks, baseline in _BASELINES.items():
            rows = {name: one for name, one in taken.items() if name in WAYS and WAYS[name].ranks == ranks}
            if ranks == 1:
                rows |= {touch: taken[touch] for touch in TOUCHES}
            if rows:
                texts.append(_table(rows, taken.get(baseline, eager), expected, ranks, states))
        for name, one in taken.items():
            if name in WAYS and WAYS[name].ours:
                faults += [f"{init} {dtype} {name}: {fault}" for fault in _faults(one, expected)]
        goals += [
            Goal(
                f"{init} in {dtype}, {state}, time of eager",
                ratio(of(taken, "nucleate", "wall_s", state), of(taken, "eager", "wall_s", state)),
                _LIMITS[dtype],
            )
            for state in states
        ]
    return Section("\n\n".join([*texts, goals_table(goals)]), series, faults)


def _construct(name: str, size: str, init: str, dtype: str, idle_s: float, state: str) -> Numbers:
    arguments = [name, "--size", size, "--init", init, "--dtype", dtype, "--seed", str(SEED)]
    arguments += ["--state", state, "--idle-s", str(idle_s)]
    if WAYS[name].ranks == 1:
        return in_process("-m", "tests.bench.construct", *arguments)
    return on_ranks("tests.bench.construct", WAYS[name].ranks, *arguments)


def _table(
    rows: dict[str, ByState], baseline: ByState, expected: dict[str, str], ranks: int, states: Sequence[str]
) -> str:
    where = "one process" if ranks == 1 else f"{ranks} gloo ranks, the slower and the larger one"
    heads = [where, "first use, s", *header("build", states, "s"), *header("x eager", states)]
    heads += [*header("CPU", states, "s"), *header("CPU for values", states), "peak, MiB", "x eager"]
    heads += ["weights = eager's", "stream"]
    cells = []
    for name, one in rows.items():
        label = WAYS[name].label if name in WAYS else TOUCHES[name]
        if one.failure is not None:
            cells.append(failed(label, one.failure, heads))
            continue
        if name in TOUCHES:
            row = [label, "", *one.seconds("load_s")]
            cells.append(row + [""] * (len(heads) - len(row)))
            continue
        over = [ratio(one.median("wall_s", state), baseline.median("wall_s", state)) for state in states]
        peak_over = ratio(one.median("peak_bytes"), baseline.median("peak_bytes") or None)
        cells.append(
            [
                label,
                f"{one.median('first_use_s'):.2f}",
                *one.seconds("wall_s"),
                *("" if value is None else f"{value:.2f}" for value in over),
                *one.numbers("cpu_s"),
                *(one.numbers("part_cpu_s") if WAYS[name].ours else [""] * len(states)),
                mib(one.median("peak_bytes") or 0),
                "" if peak_over is None else f"{peak_over:.2f}",
                *("yes" if one.every(key, expected[key]) else "**no**" for key in ("weights", "stream")),
            ]
        )
    return table(heads, cells)


def _faults(one: ByState, expected: dict[str, str]) -> list[str]:
    if one.failure is not None:
        return [one.failure]
    return [f"the {key} are not eager's" for key, value in expected.items() if not one.every(key, value)]
