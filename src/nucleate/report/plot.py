"""Loss curve as a picture: an SVG without any other package, other formats by matplotlib (extra `plot`).

matplotlib draws without a display and without global state.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from nucleate.errors import ConfigurationError, MissingDependencyError
from nucleate.report.svg_curve import Line, svg_curve

_TRAINING = "#2a78d6"
_VALIDATION = "#d1541c"
_INK = "#333333"


def save_loss_curve(
    path: str | os.PathLike[str],
    losses: Sequence[float],
    *,
    validation: Mapping[int, float] | None = None,
    title: str = "",
    unit: str = "",
) -> Path:
    """Draw the loss of each step, its running mean, and validation losses, if there are any.

    Args:
        path: The picture to write. Its suffix chooses the format: `.svg` needs no other package, `.png`, `.pdf` and
            others need matplotlib. Missing folders are made.
        losses: The training loss of every step, the first step first.
        validation: The number of steps done to the validation loss.
        title: The text above the curve.
        unit: The unit of the loss, such as `"nats per byte"`.

    Returns:
        The path that was written.

    Raises:
        ConfigurationError: `losses` is empty.
        MissingDependencyError: The format needs matplotlib, which is not installed.
    """
    if not losses:
        raise ConfigurationError("there is no loss to draw: `losses` is empty. Train at least one step first.")
    window = len(losses) // 40 // 2 * 2 + 1  # odd, so that it has a middle
    steps = range(1, len(losses) + 1)
    each = list(zip(steps, losses, strict=True))
    lines = [Line(label="training, each step", points=each, color=_TRAINING, width=1, opacity=0.3)]
    if window > 1:
        means = list(zip(steps, _running_mean(losses, window), strict=True))
        lines.append(Line(label=f"training, mean of {window} steps", points=means, color=_TRAINING))
    if validation:
        at = sorted(validation.items())
        lines.append(Line(label="validation", points=at, color=_VALIDATION, width=1.2, dots=True))
    y_label = f"loss ({unit})" if unit else "loss"
    target = Path(path)
    if target.suffix.lower() == ".svg":
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(svg_curve(lines, title=title, x_label="step", y_label=y_label), encoding="utf-8")
    else:
        _draw_by_matplotlib(target, lines, title, y_label)
    return target


def _draw_by_matplotlib(target: Path, lines: Sequence[Line], title: str, y_label: str) -> None:
    try:
        # Not pyplot: it keeps figures in a global table and looks for a display.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            f"a loss curve as {target.suffix or target.name} needs matplotlib, which is not installed. Install it with "
            "`pip install nucleate[plot]`, or choose a name that ends in .svg, which needs no other package."
        ) from error
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for line in lines:
        x, y = zip(*line.points, strict=True)
        style = "o-" if line.dots else "-"
        axes.plot(
            x, y, style, label=line.label, color=line.color, alpha=line.opacity, linewidth=line.width, markersize=4
        )
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel(y_label, color=_INK)
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of the `window` values around each position, or of fewer values at the ends."""
    means = []
    for middle in range(len(values)):
        # The window is centred: a mean of past steps would lag behind a steep curve.
        around = values[max(0, middle - window // 2) : middle + window // 2 + 1]
        means.append(sum(around) / len(around))
    return means
