"""Reports of a run: its progress, its memory, its throughput and its loss curve. Nothing here affects training."""

from nucleate.report.flops import measure_flops
from nucleate.report.memory import anonymous_bytes, format_bytes, peak_rss_bytes
from nucleate.report.plot import save_loss_curve
from nucleate.report.progress import Progress, progress
from nucleate.report.throughput import Throughput, ThroughputMonitor

__all__ = [
    "Progress",
    "Throughput",
    "ThroughputMonitor",
    "anonymous_bytes",
    "format_bytes",
    "measure_flops",
    "peak_rss_bytes",
    "progress",
    "save_loss_curve",
]
