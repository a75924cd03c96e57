"""Measurements in several states of memory: one after the other in each state, and their numbers side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.bench.markdown import seconds
from tests.bench.measure import Numbers, Series, take

#: Measures in a fresh process, in a state of memory.
Measure = Callable[[str], Numbers]


@dataclass(frozen=True)
class ByState:
    """The runs of one thing, in each state.

    Attributes:
        series: The runs, by state.
    """

    series: Mapping[str, Series]

    @property
    def failure(self) -> str | None:
        """Why there are too few numbers, in the first state of which this is true."""
        return next((one.failure for one in self.series.values() if one.failure is not None), None)

    @property
    def pooled(self) -> Series:
        """The runs of all states, for numbers that do not depend on it."""
        return Series([run for one in self.series.values() for run in one.runs], self.failure)

    def median(self, key: str, state: str | None = None) -> float | None:
        """Return a median in one state, or over all runs; None: it was not measured."""
        one = self.pooled if state is None else self.series.get(state)
        if one is None or one.failure is not None or not one.runs or None in one.values(key):
            return None
        return one.median(key)

    def every(self, key: str, expected: object) -> bool:
        """Return whether it was as expected in every single run."""
        return self.pooled.every(key, expected)

    def seconds(self, key: str) -> list[str]:
        """Write a time, in one cell for each state."""
        return ["" if None in one.values(key) else seconds(one.values(key)) for one in self.series.values()]

    def numbers(self, key: str, digits: int = 2) -> list[str]:
        """Write a median, in one cell for each state."""
        values = [self.median(key, state) for state in self.series]
        return ["" if value is None else f"{value:.{digits}f}" for value in values]


def take_in_states(
    measurements: Mapping[str, Measure],
    states: Sequence[str],
    runs: int,
    once: Sequence[str] = (),
    what: str = "",
) -> dict[str, ByState]:
    """Run A in each state, B in each state, ..., and then again.

    Args:
        measurements: Name to a function that measures in a fresh process, in a state.
        states: Which of `state.STATES`.
        runs: How often each is taken in each state.
        once: Those that are taken once only.
        what: Shown before the name while it runs.
    """
    each: dict[str, Callable[[], Numbers]] = {
        f"{name} {state}": partial(measure, state) for name, measure in measurements.items() for state in states
    }
    taken = take(each, runs, [f"{name} {state}" for name in once for state in states], what)
    return {name: ByState({state: taken[f"{name} {state}"] for state in states}) for name in measurements}


def flat(prefix: str, taken: Mapping[str, ByState]) -> dict[str, Series]:
    """Return the series by prefix, name and state."""
    return {
        " ".join(filter(None, (prefix, name, state))): series
        for name, one in taken.items()
        for state, series in one.series.items()
    }


def header(text: str, states: Sequence[str], unit: str = "") -> list[str]:
    """Write the heads of a number's columns, one for each state."""
    return [f"{text}, {state}{unit and f', {unit}'}" for state in states]


def of(taken: Mapping[str, ByState], name: str, key: str, state: str | None = None) -> Any:
    """Return a median, None where it was not measured."""
    one = taken.get(name)
    return None if one is None else one.median(key, state)
