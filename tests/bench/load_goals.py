"""The goals of loading and of quantizing: nucleate's times and peaks beside its peers', in each state of memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tests.bench.by_state import ByState
from tests.bench.floors import TOUCH
from tests.bench.goal import Goal, ratio, total
from tests.bench.state import TOUCHED, UNTOUCHED

_MIB = 2**20


@dataclass(frozen=True)
class Ratios:
    """Medians of one table, and their ratios; None where something was not measured.

    Attributes:
        taken: What was measured, by way.
        states: The states of memory it was measured in.
    """

    taken: Mapping[str, ByState]
    states: Sequence[str]

    def of(self, way: str, key: str = "load_s", state: str | None = None) -> float | None:
        one = self.taken.get(way)
        return None if one is None else one.median(key, state)

    def over(self, way: str, peer: str, key: str = "load_s", state: str | None = None) -> float | None:
        return ratio(self.of(way, key, state), self.of(peer, key, state))

    def in_each(
        self, text: str, way: str, peer: str, limit: float, key: str = "load_s", states: Sequence[str] | None = None
    ) -> list[Goal]:
        """Return the goal that a way takes so much of a peer's time, for some states that were measured."""
        return [
            Goal(f"{text}, {state}", self.over(way, peer, key, state), limit)
            for state in self.states
            if states is None or state in states
        ]

    def first_touch(self, text: str, way: str) -> Goal:
        """Return the goal that untouched memory costs no more than to touch it."""
        most = total(self.of(way, state=TOUCHED), self.of(TOUCH, state=UNTOUCHED))
        return Goal(
            f"{text}, untouched, time when touched and of touching page by page",
            ratio(self.of(way, state=UNTOUCHED), most),
            1.0,
        )

    def peak_over_limit(self, way: str) -> float | None:
        """Return the peak of anonymous memory over what is kept, 8 MiB for each thread and 16 MiB."""
        peak, kept, threads = (self.of(way, key) for key in ("peak_bytes", "kept_bytes", "threads"))
        if peak is None or kept is None or threads is None:
            return None
        return peak / (kept + threads * 8 * _MIB + 16 * _MIB)


def _bf16_goals(ratios: Ratios) -> list[Goal]:
    peers = {
        "dcp": ("DCP's reader", 0.45),
        "accelerate": ("Accelerate's `load_checkpoint_and_dispatch`", 0.2),
        "accelerate-in-model": ("Accelerate's `load_checkpoint_in_model`", 0.2),
        "fabric": ("Fabric's `load_raw`", 0.2),
    }
    private = "bf16 into private memory, time of"
    goals = [
        *ratios.in_each(f"{private} Fabric and `load_file`, copied", "nucleate", "fabric-load-file", 1.0),
        *ratios.in_each(f"{private} `safe_open` and copy", "nucleate", "safe-open", 0.5),
    ]
    for way, (name, limit) in peers.items():
        goals += ratios.in_each(f"{private} {name}", "nucleate", way, limit, states=[TOUCHED])
    update = "load and first update, time of transformers"
    goals += ratios.in_each(update, "nucleate", "transformers", 0.15, "ready_s", [TOUCHED])
    goals += ratios.in_each("aliasing, time of transformers", "nucleate-mmap", "transformers", 0.6, states=[TOUCHED])
    peak = "peak of anonymous memory, of weights + 8 MiB a thread + 16 MiB"
    return [*goals, Goal(peak, ratios.peak_over_limit("nucleate"), 1.0)]


def _fp32_goals(ratios: Ratios) -> list[Goal]:
    return [
        *ratios.in_each("fp32 to bf16, time of transformers", "nucleate", "transformers", 0.65, states=[TOUCHED]),
        ratios.first_touch("fp32 to bf16", "nucleate"),
        Goal("fp32 to bf16, peak RSS of transformers", ratios.over("nucleate", "transformers", "rss_bytes"), 0.35),
        Goal(
            "fp32 to bf16, peak of anonymous memory, of weights + 8 MiB a thread + 16 MiB",
            ratios.peak_over_limit("nucleate"),
            1.0,
        ),
    ]


def _cold_goals(ratios: Ratios) -> list[Goal]:
    return [
        Goal(
            f"not in memory, the disk's sequential rate, {state}",
            ratios.over("disk", "nucleate", state=state),
            0.9,
            at_least=True,
        )
        for state in ratios.states
    ]


def _ranks_goals(ratios: Ratios) -> list[Goal]:
    ours = "nucleate-fsdp"
    return [
        *ratios.in_each("2 FSDP ranks, time of DCP's reader", ours, "dcp-ranks", 0.6, states=[TOUCHED]),
        *ratios.in_each("2 FSDP ranks, time of Fabric's `load_raw`", ours, "fabric-ranks", 0.2, states=[TOUCHED]),
        ratios.first_touch("2 FSDP ranks", ours),
        Goal("2 FSDP ranks, each rank's peak RSS over its base, of its shard", ratios.of(ours, "rss_over_kept"), 1.05),
    ]


def quantize_goals(mode: str, ratios: Ratios) -> list[Goal]:
    """Return the goals of loading into quantized layers."""
    time_limit, memory_limit = {"int8": (0.2, 0.4), "nf4": (0.15, 0.35)}[mode]
    return [
        *ratios.in_each(f"{mode}, time of transformers", "nucleate", "transformers", time_limit, states=[TOUCHED]),
        ratios.first_touch(mode, "nucleate"),
        Goal(f"{mode}, peak RSS of transformers", ratios.over("nucleate", "transformers", "rss_bytes"), memory_limit),
    ]


def fixed_goals(first_s: float | None, import_s: float | None) -> list[Goal]:
    """Return the goals of a tiny model of which nothing is made."""
    both = total(first_s, import_s)
    return [
        Goal("a model without values, first use, ms", None if first_s is None else first_s * 1e3, 30),
        Goal("the same and the import, ms", None if both is None else both * 1e3, 30),
    ]


#: The goals of each table that depends on the state of memory.
LOAD_GOALS: dict[str, Callable[[Ratios], list[Goal]]] = {
    "bf16": _bf16_goals,
    "fp32": _fp32_goals,
    "cold": _cold_goals,
    "ranks": _ranks_goals,
}
