"""Loss curve as an SVG picture, written without a drawing library; every browser shows it.

This file decides where lines, numbers and words stand in the picture. `nucleate.report.plot` decides which lines there
are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Pixels of the picture, and the edges of the axes in it.
_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 700, 40, 370
_INK = "#333333"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the picture.

    Args:
        label: The words in the legend.
        points: The step and the value of each point. A value that is not finite leaves a gap.
        color: A color that SVG knows.
        width: The line's width in pixels.
        opacity: From 0 to 1.
        dots: Whether each point gets a dot.
    """

    label: str
    points: Sequence[tuple[float, float]]
    color: str
    width: float = 1.8
    opacity: float = 1.0
    dots: bool = False


def svg_curve(lines: Sequence[Line], *, title: str, x_label: str, y_label: str) -> str:
    """Return a picture of `lines` with axes, grid and legend."""
    points = [point for line in lines for point in line.points if math.isfinite(point[1])]
    last = max((x for line in lines for x, _ in line.points), default=1.0)
    x_ticks = _ticks(0.0, last)
    y_ticks = _ticks(min((y for _, y in points), default=0.0), max((y for _, y in points), default=1.0))
    # The steps end where the run ended; the values end at a line of the grid.
    low, high = y_ticks[0], y_ticks[-1]

    def across(x: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * x / last

    def down(y: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (y - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'font-family="sans-serif" font-size="12" fill="{_INK}">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_LEFT, 24, title, size=15),
        _text((_LEFT + _RIGHT) / 2, _HEIGHT - 12, x_label, anchor="middle"),
        f'<g transform="rotate(-90)">{_text(-(_TOP + _BOTTOM) / 2, 18, y_label, anchor="middle")}</g>',
    ]
    for x in x_ticks:
        if x <= last:
            parts.append(_segment(across(x), _TOP, across(x), _BOTTOM))
            parts.append(_text(across(x), _BOTTOM + 18, f"{x:g}", anchor="middle"))
    for y in y_ticks:
        parts.append(_segment(_LEFT, down(y), _RIGHT, down(y)))
        parts.append(_text(_LEFT - 8, down(y) + 4, f"{y:g}", anchor="end"))
    for number, line in enumerate(lines):
        parts.extend(_drawn(line, [(across(x), down(y)) for x, y in line.points]))
        height = _TOP + 16 + 18 * number
        parts.extend(_drawn(line, [(_RIGHT - 200, height - 4), (_RIGHT - 176, height - 4)]))
        parts.append(_text(_RIGHT - 168, height, line.label))
    return "\n".join([*parts, "</svg>\n"])


def _ticks(low: float, high: float) -> list[float]:
    """Return about six round numbers; the first is at most `low`, the last at least `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    # The division keeps 0.3 from becoming 0.30000000000000004.
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def _drawn(line: Line, places: Iterable[tuple[float, float]]) -> list[str]:
    """Return a line without its gaps, and its dots."""
    runs: list[list[tuple[float, float]]] = [[]]
    for place in places:
        if math.isfinite(place[1]):
            runs[-1].append(place)
        else:
            runs.append([])
    look = f'stroke="{line.color}" stroke-width="{line.width:g}" stroke-opacity="{line.opacity:g}"'
    drawn = [
        f'<polyline fill="none" {look} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in run)}"/>' for run in runs if run
    ]
    # A run of one point has no length.
    dots = [place for run in runs if line.dots or len(run) == 1 for place in run]
    return [*drawn, *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{line.color}"/>' for x, y in dots)]


def _segment(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{_INK}" stroke-opacity="0.2"/>'


def _text(x: float, y: float, words: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{_escaped(words)}</text>'


def _escaped(words: str) -> str:
    return words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
