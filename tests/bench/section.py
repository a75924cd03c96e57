"""The results of one benchmark: its Markdown, its numbers and its faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.bench.measure import Series


@dataclass
class Section:
    """The results of one benchmark.

    Attributes:
        text: Its Markdown.
        series: Its numbers, by what was measured.
        faults: Where nucleate failed, or its results are not eager's.
    """

    text: str
    series: Mapping[str, Series]
    faults: list[str]
