"""Tables and a chart of how models were loaded."""

from __future__ import annotations

import csv
import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
INK, DARK, LIGHT, OTHERS = "#333333", "#2a78d6", "#a9c9ef", "#8a8a8a"

Results = dict[str, dict[str, Any]]


def machine() -> str:
    """Return in words what the numbers depend on."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (
        f"{os.cpu_count()} {platform.machine()} cores ({torch.backends.cpu.get_cpu_capability()}), "
        f"{memory_bytes / GIB:.0f} GiB, torch {torch.__version__}, {datetime.date.today()}"
    )


def table(results: Results) -> str:
    """Return a table in Markdown, one way in each row; what was not measured is left empty."""
    columns = {
        "load, s": ("load_s", 1, "{:.2f}"),
        "peak of the device, GiB": ("device_bytes", GIB, "{:.2f}"),
        "peak of the host, GiB": ("host_bytes", GIB, "{:.2f}"),
        "mapped files, GiB": ("mapped_bytes", GIB, "{:.2f}"),
        "kept, GiB": ("kept_bytes", GIB, "{:.2f}"),
        "held-out loss": ("loss", 1, "{:.4f}"),
        "tokens/s": ("tokens_per_s", 1, "{:.1f}"),
    }
    if all(result["tokens_per_s"] is None for result in results.values()):
        del columns["tokens/s"]
    rows = []
    for name, result in results.items():
        cells = [
            "" if result.get(key) is None else form.format(result[key] / unit) for key, unit, form in columns.values()
        ]
        if result["device_bytes"] is None:
            cells[1] = "= host"  # the device is the CPU
        rows.append([name, *cells])
    return as_markdown(["", *columns], rows)


def survivors(results: dict[str, dict[float, dict[str, Any]]]) -> str:
    """Return a table in Markdown of what became of each way under each memory limit in GiB."""
    limits = list(next(iter(results.values())))
    rows = []
    for name, runs in results.items():
        alive = next((run for run in runs.values() if "killed_s" not in run), None)
        cells = [
            f"killed at {run['killed_s']:.0f} s"
            if "killed_s" in run
            else f"{run['load_s']:.1f} s, {run['process_bytes'] / GIB:.1f} GiB"
            for run in runs.values()
        ]
        rows.append(
            [name, *cells, f"{alive['kept_bytes'] / GIB:.1f}" if alive else "", f"{alive['loss']:.4f}" if alive else ""]
        )
    return as_markdown(["", *(f"limit {limit:g} GiB" for limit in limits), "kept, GiB", "held-out loss"], rows)


def as_markdown(header: list[str], rows: list[list[str]]) -> str:
    """Columns are as wide as what they hold, so that it reads well on a terminal, too."""
    widths = [max(3, *(len(row[column]) for row in [header, *rows])) for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in [header, rule, *rows]
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_csv(path: Path, results: Results) -> None:
    with path.open("w", newline="") as file:
        rows = csv.DictWriter(file, ["way", *next(iter(results.values()))])
        rows.writeheader()
        rows.writerows({"way": name, **result} for name, result in results.items())


def draw(path: Path, results: Results, words: str) -> None:
    """Draw a row of bars for each way: seconds, memory and loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.5 + 0.36 * len(results)), dpi=150, layout="constrained")
    seconds, memory, loss = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2))
    figure.suptitle(words, x=0.01, ha="left", fontsize=10, color=INK)
    rows = range(len(results))

    def values(key: str, unit: float = 1) -> list[float]:
        return [(result.get(key) or 0) / unit for result in results.values()]

    bars = seconds.barh(rows, values("load_s"), 0.7, color=DARK)
    seconds.bar_label(bars, fmt="%.2f", padding=3, fontsize=8, color=INK)
    seconds.set_xlabel("seconds to load")

    # The peak behind, what is kept before it; pages of mapped files, which the kernel may take back, are hatched.
    host, mapped, device = values("host_bytes", GIB), values("mapped_bytes", GIB), values("device_bytes", GIB)
    height = 0.35 if any(device) else 0.7
    upper = [row - (0.7 - height) / 2 for row in rows]
    memory.barh(upper, host, height, color=LIGHT, label="peak of the host")
    hatched = {"color": "none", "edgecolor": LIGHT, "hatch": "////", "linewidth": 0}
    bars = memory.barh(upper, mapped, height, host, label="mapped files", **hatched)
    sums = [f"{own:.2f}" + f" + {file:.2f}" * (file >= 0.005) for own, file in zip(host, mapped, strict=True)]
    memory.bar_label(bars, sums, padding=3, fontsize=8, color=INK)
    if any(device):
        bars = memory.barh([row + height for row in upper], device, height, color=OTHERS, label="peak of the device")
        memory.bar_label(bars, fmt="%.2f", padding=3, fontsize=8, color=INK)
    memory.barh(rows, values("kept_bytes", GIB), 0.2, color=DARK, label="kept")
    memory.set_xlabel("memory, GiB")
    handles = memory.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper right", ncols=4, fontsize=8, frameon=False)

    loss.plot(values("loss"), rows, "o", color=DARK)
    for row, value in zip(rows, values("loss"), strict=True):
        loss.annotate(f"{value:.4f}", (value, row), (6, 0), textcoords="offset points", va="center", fontsize=8)
    loss.locator_params(axis="x", nbins=3)
    loss.ticklabel_format(axis="x", useOffset=False)
    loss.set_xlabel("held-out loss, nats a byte")

    for axes in (seconds, memory, loss):
        axes.margins(x=0.6 if axes is loss else 0.2)
        axes.tick_params(labelsize=8, labelcolor=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
    seconds.set_yticks(rows, list(results), fontsize=9)
    seconds.invert_yaxis()
    figure.savefig(path)
