"""Loss curve as a picture. matplotlib (extra `plot`) draws it without a display and without global state."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from nucleate.errors import ConfigurationError, MissingDependencyError

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
        path: The picture to write. Its suffix chooses the format (`.png`, `.svg`, `.pdf`). Missing folders are made.
        losses: The training loss of every step, the first step first.
        validation: The number of steps done to the validation loss.
        title: The text above the curve.
        unit: The unit of the loss, such as `"nats per byte"`.

    Returns:
        The path that was written.

    Raises:
        ConfigurationError: `losses` is empty.
        MissingDependencyError: matplotlib is not installed.
    """
    if not losses:
        raise ConfigurationError("there is no loss to draw: `losses` is empty. Train at least one step first.")
    try:
        # Not pyplot: it keeps figures in a global table and looks for a display.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "a loss curve needs matplotlib, which is not installed. Install it with `pip install nucleate[plot]`."
        ) from error
    window = len(losses) // 40 // 2 * 2 + 1  # odd, so that it has a middle
    steps = range(1, len(losses) + 1)
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color=_TRAINING, alpha=0.25, linewidth=1, label="training, each step")
    if window > 1:
        axes.plot(
            steps,
            _running_mean(losses, window),
            color=_TRAINING,
            linewidth=1.8,
            label=f"training, mean of {window} steps",
        )
    if validation:
        at = sorted(validation)
        axes.plot(
            at,
            [validation[step] for step in at],
            "o-",
            color=_VALIDATION,
            markersize=4,
            linewidth=1.2,
            label="validation",
        )
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel(f"loss ({unit})" if unit else "loss", color=_INK)
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of the `window` values around each position, or of fewer values at the ends."""
    means = []
    for middle in range(len(values)):
        # The window is centred: a mean of past steps would lag behind a steep curve.
        around = values[max(0, middle - window // 2) : middle + window // 2 + 1]
        means.append(sum(around) / len(around))
    return means
