"""The picture of when deferring pays, drawn by matplotlib: time of deferred over eager construction, by size."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.bench.when_section import Point

# Okabe and Ito's blue and vermillion, which the colour-blind tell apart; and markers and dashes.
_COLORS = {"few": "#0072B2", "many": "#D55E00"}
_DASHES = {"fp32": "-", "bf16": "--"}
_MARKERS = {"few": "o", "many": "s"}
_INK = "#333333"
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
_NAMES = {10**6: "1 M", 10**7: "10 M", 10**8: "100 M", 10**9: "1 B", 10**10: "10 B"}


def draw(points: Sequence[Point], path: Path, words: dict[str, str]) -> None:
    """Draw one panel for each state of memory and number of threads, and one line for each kind of model.

    Args:
        points: What was measured.
        path: The picture; without matplotlib it stays as it is.
        words: What the picture calls the kinds.
    """
    try:
        # Not pyplot: it keeps figures in a global table and looks for a display.
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        print(f"{path.name} was not drawn: matplotlib is not installed", file=sys.stderr)
        return
    states = list(dict.fromkeys(point.setting.state for point in points))
    threads = sorted({point.setting.threads for point in points})
    # The same numbers give the same file, and its text can be searched.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nucleate"}):
        figure = Figure(figsize=(4.3 * len(states) + 0.5, 2.9 * len(threads) + 0.8), layout="constrained")
        panels = figure.subplots(len(threads), len(states), sharex=True, sharey=True, squeeze=False)
        for row, number in enumerate(threads):
            for column, state in enumerate(states):
                panel = panels[row][column]
                inside = [p for p in points if (p.setting.threads, p.setting.state) == (number, state)]
                _panel(panel, inside)
                noun = "thread" if number == 1 else "threads"
                panel.set_title(f"{state} memory, {number} {noun}", loc="left", fontsize=10, color=_INK)
                if row == len(threads) - 1:
                    panel.set_xlabel("parameters", color=_INK)
                if column == 0:
                    panel.set_ylabel("deferred / eager, time", color=_INK)
        lines = [
            Line2D([], [], color=_COLORS[kind], linestyle=_DASHES[dtype], marker=_MARKERS[kind], markersize=5)
            for kind in words
            for dtype in _DASHES
        ]
        labels = [f"{words[kind]} tensors, {dtype}" for kind in words for dtype in _DASHES]
        figure.legend(lines, labels, loc="outside upper center", ncols=2 * len(states), frameon=False, fontsize=9)
        figure.savefig(path, metadata={"Date": None})


def _panel(panel: Any, points: Sequence[Point]) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.axhline(1, color=_INK, linewidth=1)
    for setting in dict.fromkeys(point.setting for point in points):
        line = [(p.num_parameters, p.ratio) for p in points if p.setting == setting and p.ratio is not None]
        panel.plot(
            [x for x, _ in line],
            [y for _, y in line],
            color=_COLORS[setting.kind],
            linestyle=_DASHES[setting.dtype],
            marker=_MARKERS[setting.kind],
            # An open marker, so that one below shows.
            markerfacecolor="white" if setting.dtype == "bf16" else _COLORS[setting.kind],
            markersize=5,
            linewidth=1.5,
        )
    panel.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    panel.set_xticks(list(_NAMES), list(_NAMES.values()))
    panel.minorticks_off()
    ratios = [point.ratio for point in points if point.ratio is not None]
    sizes = [point.num_parameters for point in points]
    if ratios:
        panel.set_ylim(min(0.25, *ratios) / 1.2, max(2.0, *ratios) * 1.2)
        panel.set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)
    panel.text(0.01, 0.97, "as fast as eager", transform=panel.get_yaxis_transform(), ha="left", va="top",
               fontsize=8, color=_INK)  # fmt: skip
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(colors=_INK)
