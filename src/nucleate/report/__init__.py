"""Reports of a run: its progress, its memory, and its loss curve. Nothing here affects training."""

from nucleate.report.memory import anonymous_bytes, format_bytes, peak_rss_bytes
from nucleate.report.plot import save_loss_curve
from nucleate.report.progress import Progress, progress

__all__ = [
    "Progress",
    "anonymous_bytes",
    "format_bytes",
    "peak_rss_bytes",
    "progress",
    "save_loss_curve",
]
