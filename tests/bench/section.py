"""The results of one benchmark: its Markdown, its numbers and its faults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.bench.measure import Series


@dataclass
class Section:
    """The results of one benchmark.

    Attributes:
        text: Its Markdown.
        series: Its numbers, by what was measured.
        faults: Where nucleate failed, or its results are not eager's.
        draw: Draws its picture into the folder of the page, if it has one.
    """

    text: str
    series: Mapping[str, Series]
    faults: list[str]
    draw: Callable[[Path], object] | None = None
