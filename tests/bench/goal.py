"""Goals: the limits of numbers, beside the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.markdown import table


@dataclass(frozen=True)
class Goal:
    """A number and its limit.

    Attributes:
        text: The number in words.
        value: The measured number; None: it was not measured.
        limit: The most that meets the goal.
        at_least: The limit is the least that meets the goal.
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


def goals_table(goals: Sequence[Goal]) -> str:
    """Write the table of goals, with its heading."""
    return "### Goals\n\n" + table(["", "goal", "measured", ""], [goal.row() for goal in goals])


def ratio(value: float | None, other: float | None) -> float | None:
    """Return a ratio; None where either was not measured."""
    return None if value is None or other is None else value / other


def total(*values: float | None) -> float | None:
    """Return a sum; None where one of its numbers was not measured."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
