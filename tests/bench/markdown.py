"""Markdown for the tables of the benchmark page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table; all columns but the first are flush right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def failed(label: str, failure: str, header: Sequence[str]) -> list[str]:
    """Write the row of something that did not run."""
    return [label, f"does not run: {escaped(failure)}", *[""] * (len(header) - 2)]


def seconds(values: Sequence[Any]) -> str:
    """Write the median, and how far the runs lie apart."""
    if not values:
        return ""
    digits = 3 if statistics.median(values) < 0.2 else 2
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def millions(parameters: int) -> str:
    """Write a number of parameters."""
    if parameters >= 10**9:
        return f"{parameters / 1e9:.2f} billion"
    return f"{parameters / 1e6:.2g} million" if parameters < 10**8 else f"{parameters / 1e6:.0f} million"


def mib(num_bytes: float) -> str:
    """Write a number of bytes in MiB."""
    return f"{num_bytes / 2**20:.0f}"


def escaped(text: str) -> str:
    """Write a text so that it stays in its cell."""
    return text.replace("|", "\\|")
