"""The section on when deferring pays: ratios for each kind of model, the rule that comes of them, and a picture."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from nucleate.materialize.block import ONSET_NUMEL
from tests.bench.markdown import millions, table
from tests.bench.measure import Series, in_process, take
from tests.bench.section import Section
from tests.bench.state import IDLE_S, STATES
from tests.bench.when import DTYPES, NARROW, SIZES, num_parameters, shape
from tests.bench.when_plot import draw

KINDS = {"few": "few large", "many": "many small"}
THREADS = (1, 2)
PICTURE = "when-deferring-pays.svg"
#: A process constructs all small models, one after the other; those larger are measured half as often.
SMALL = ("1m", "4m", "16m", "64m")
#: What two runs of the same thing differ by.
TOLERANCE = 0.05


@dataclass(frozen=True, order=True)
class Setting:
    """What one line of the picture is measured in.

    Attributes:
        kind: Which of `KINDS`.
        dtype: Which of `DTYPES`.
        threads: torch's threads.
        state: Which of `STATES`.
    """

    kind: str
    dtype: str
    threads: int
    state: str


@dataclass(frozen=True)
class Point:
    """One model in one setting, constructed in several ways.

    Attributes:
        setting: In what it was measured.
        size: Which of `SIZES`.
        seconds: Median by way.
        peaks: Median of the peak in bytes, by way.
    """

    setting: Setting
    size: str
    seconds: Mapping[str, float]
    peaks: Mapping[str, float]

    @property
    def ratio(self) -> float | None:
        return self.over_eager("nucleate")

    def over_eager(self, way: str) -> float | None:
        if way not in self.seconds or "eager" not in self.seconds:
            return None
        return self.seconds[way] / self.seconds["eager"]

    @property
    def num_parameters(self) -> int:
        return num_parameters(self.setting.kind, self.size)

    @property
    def num_tensors(self) -> int:
        return 2 * shape(self.setting.kind, self.size)[0]

    @property
    def weight_numel(self) -> int:
        return shape(self.setting.kind, self.size)[1] ** 2


def when(
    runs: int,
    sizes: Sequence[str] = tuple(SIZES),
    states: Sequence[str] = STATES,
    threads: Sequence[int] = THREADS,
    idle_s: float = IDLE_S,
) -> Section:
    """Measure eager and deferred construction of models of several sizes.

    Args:
        runs: Fresh processes for each number of small models; half as many for large ones.
        sizes: Which of `SIZES`.
        states: Which of `STATES`.
        threads: Numbers of torch's threads.
        idle_s: Seconds of rest that make memory untouched.
    """
    sizes = [size for size in SIZES if size in sizes]
    series: dict[str, Series] = {}
    points: list[Point] = []
    for group, count in (
        ([size for size in sizes if size in SMALL], runs),
        ([size for size in sizes if size not in SMALL], math.ceil(runs / 2)),
    ):
        if not group:
            continue
        for state, number, dtype, kind in itertools.product(states, threads, DTYPES, KINDS):
            setting = Setting(kind, dtype, number, state)
            taken = take(
                {way: partial(_measure, way, setting, group, idle_s) for way in _ways(setting, threads)},
                count,
                what=f"when {kind} {dtype} {number} {state} {group[0]}..",
            )
            series |= {f"{kind} {dtype} {number} {state} {group[0]} {way}": one for way, one in taken.items()}
            points += [_point(setting, size, taken) for size in group]
    faults = [f"when {name}: {one.failure}" for name, one in series.items() if one.failure is not None]
    faults += _differences(series)
    text = "\n\n".join(
        [rule(points), f"![Time of deferred over eager construction]({PICTURE})", *_tables(points, idle_s)]
    )
    return Section(text, series, faults, draw=lambda folder: draw(points, folder / PICTURE, KINDS))


def _ways(setting: Setting, threads: Sequence[int]) -> list[str]:
    ways = ["eager", "nucleate"]
    # These are there to be compared in one setting, not in all.
    if setting.kind == "few" and setting.dtype == "bf16" and setting.threads == threads[-1]:
        ways.append("cast")
    if setting.dtype == "fp32" and setting.threads == threads[-1]:
        ways.append("unsaid")
    return ways


def _measure(way: str, setting: Setting, sizes: Sequence[str], idle_s: float) -> dict[str, object]:
    where = ("--kind", setting.kind, "--dtype", setting.dtype, "--state", setting.state, "--idle-s", str(idle_s))
    return in_process("-m", "tests.bench.when", way, *where, "--sizes", *sizes, threads=setting.threads)


def _point(setting: Setting, size: str, taken: Mapping[str, Series]) -> Point:
    def medians(key: str) -> dict[str, float]:
        return {
            way: statistics.median(run[size][key] for run in one.runs)
            for way, one in taken.items()
            # Not where there was too little memory for it.
            if one.failure is None and size in one.runs[0]
        }

    return Point(setting, size, medians("wall_s"), medians("peak_bytes"))


def _differences(series: Mapping[str, Series]) -> list[str]:
    """Return where the weights or the stream of nucleate are not eager's."""
    faults = []
    for name, one in series.items():
        setting, _, way = name.rpartition(" ")
        eager = series[f"{setting} eager"]
        if way not in ("nucleate", "unsaid") or one.failure is not None or eager.failure is not None:
            continue
        for size in eager.runs[0].keys() & one.runs[0].keys():
            for key in ("mark", "stream"):
                if any(run[size][key] != eager.runs[0][size][key] for run in one.runs):
                    faults.append(f"when {name} {size}: the {key} is not eager's")
    return faults


# -- the rule ----------------------------------------------------------------------------------------------


def rule(points: Sequence[Point]) -> str:
    """Say in words from which size on deferring pays, what a tensor costs, and what memory is taken."""
    measured = [point for point in points if point.ratio is not None]
    if not measured:
        return "Nothing was measured."
    numel = smallest(measured, lambda point: point.weight_numel)
    if numel is None:
        largest = max(point.weight_numel for point in measured)
        sentences = [
            f"**The rule.** Up to weights of {millions(largest)} elements there is no size from which on deferring "
            "pays in every setting."
        ]
    else:
        sentences = [
            f"**The rule: defer where the weights of a model have {millions(numel)} elements or more.** From that size "
            f"on, deferred construction took at most the time of eager construction, within {TOLERANCE:.0%}, in each "
            f"of the {len({point.setting for point in measured})} settings below."
        ]
    for kind, words in KINDS.items():
        of_kind = [point for point in measured if point.setting.kind == kind]
        found = smallest(of_kind, lambda point: point.num_parameters)
        if of_kind:
            bound = f"from {millions(found)} parameters on" if found else "at no size that was measured"
            sentences.append(f"For {words} tensors it pays {bound}.")
    sentences += [*_costs(measured), *_memory(points)]
    sentences.append(
        f"`init_module()` on one CPU follows the rule: it defers from the first weight of {ONSET_NUMEL:,} elements on "
        f"(`nucleate.materialize.block.ONSET_NUMEL`), and its tensors are real when the block ends.{_unsaid(points)}"
    )
    return " ".join(sentences)


def smallest(points: Sequence[Point], of: Callable[[Point], int]) -> int | None:
    """Return the smallest number from which on no point is slower than eager construction; None if there is none."""
    slow = max((of(point) for point in points if point.ratio is not None and point.ratio > 1 + TOLERANCE), default=0)
    return min((of(point) for point in points if of(point) > slow), default=None)


def _costs(points: Sequence[Point]) -> list[str]:
    narrow = [point for point in points if point.weight_numel == NARROW**2]
    per_tensor = [(p.seconds["nucleate"] - p.seconds["eager"]) / p.num_tensors * 1e3 for p in narrow]
    largest = max(point.weight_numel for point in points)
    saved = [
        (p.seconds["eager"] - p.seconds["nucleate"]) / p.num_parameters * 1e9
        for p in points
        if p.weight_numel == largest
    ]
    sentences = []
    if per_tensor:
        sentences.append(
            f"A weight or bias of a layer of {NARROW} x {NARROW} costs {_range(per_tensor)} ms more than in eager "
            "construction."
        )
    sentences.append(
        f"In weights of {millions(largest)} elements, deferring saves {_range(saved)} ns for each element."
    )
    return sentences


def _memory(points: Sequence[Point]) -> list[str]:
    """Say how many bytes a parameter the largest models of few tensors take at the peak."""
    peaks: dict[tuple[str, str], list[float]] = {}
    few = [point for point in points if point.setting.kind == "few"]
    largest = max((point.num_parameters for point in few), default=0)
    for point in few:
        if point.num_parameters == largest:
            for way, peak_bytes in point.peaks.items():
                peaks.setdefault((way, point.setting.dtype), []).append(peak_bytes / point.num_parameters)

    def bytes_of(way: str, dtype: str) -> str:
        return f"{statistics.median(peaks[(way, dtype)]):.2f}" if (way, dtype) in peaks else "?"

    sentences = [
        f"Eager construction peaks at {bytes_of('eager', 'fp32')} bytes a parameter in fp32 and "
        f"{bytes_of('eager', 'bf16')} in bf16, deferred construction at {bytes_of('nucleate', 'fp32')} and "
        f"{bytes_of('nucleate', 'bf16')}."
    ]
    if ("cast", "bf16") in peaks:
        sentences.append(
            f"A model that is constructed in fp32 and then cast by `.to(torch.bfloat16)` peaks at "
            f"{bytes_of('cast', 'bf16')}."
        )
    return sentences


def _unsaid(points: Sequence[Point]) -> str:
    ratios = [(ratio, point) for point in points if (ratio := point.over_eager("unsaid")) is not None]
    if not ratios:
        return ""
    worst_ratio, worst = max(ratios, key=lambda pair: pair[0])
    added_ms = (worst.seconds["unsaid"] - worst.seconds["eager"]) * 1e3
    where = f"{millions(worst.num_parameters)} parameters in {KINDS[worst.setting.kind]} tensors"
    return (
        f" It took {min(ratio for ratio, _ in ratios):.2f} to {worst_ratio:.2f} times the time of eager construction. "
        f"The highest ratio is a difference of {added_ms:.0f} ms, for {where}."
    )


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"


# -- tables ------------------------------------------------------------------------------------------------


def _tables(points: Sequence[Point], idle_s: float) -> list[str]:
    sizes = [size for size in SIZES if any(point.size == size for point in points)]
    by_place = {(point.setting, point.size): point for point in points}
    settings = sorted({point.setting for point in points}, key=_order)
    rows = []
    for setting in settings:
        ratios = [by_place[(setting, size)].ratio for size in sizes]
        rows.append([*_labels(setting), *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
    header = ["tensors", "dtype", "threads", "memory", *sizes]
    texts = [
        f"Time of deferred over eager construction. *Few large*: {shape('few', '1m')[0]} layers. *Many small*: layers "
        f"of {NARROW} x {NARROW}, at most {shape('many', '2b')[0]:,}; larger models have as many, but wider ones. "
        f"*Untouched*: the process idled for {idle_s:g} s before.",
        table(header, rows),
    ]
    others = {"cast": "eager in fp32, then `.to(torch.bfloat16)`", "unsaid": "`init_module()` + `setup`"}
    rows = [
        [label, *_labels(setting), *(_cell(by_place[(setting, size)], way) for size in sizes)]
        for way, label in others.items()
        for setting in settings
        if any(way in by_place[(setting, size)].seconds for size in sizes)
    ]
    if rows:
        texts += ["Other ways, over eager construction in the same dtype:", table(["", *header], rows)]
    rows = [
        [*_labels(setting), *(_seconds(by_place[(setting, size)]) for size in sizes)]
        for setting in settings
        if any("eager" in by_place[(setting, size)].seconds for size in sizes)
    ]
    return [*texts, "Seconds of eager construction:", table(header, rows)]


def _order(setting: Setting) -> tuple[int, int, int, int]:
    return (
        list(KINDS).index(setting.kind),
        list(DTYPES).index(setting.dtype),
        setting.threads,
        STATES.index(setting.state),
    )


def _labels(setting: Setting) -> list[str]:
    return [KINDS[setting.kind], setting.dtype, str(setting.threads), setting.state]


def _cell(point: Point, way: str) -> str:
    ratio = point.over_eager(way)
    return "" if ratio is None else f"{ratio:.2f}"


def _seconds(point: Point) -> str:
    return f"{point.seconds['eager']:.3g}" if "eager" in point.seconds else "?"
