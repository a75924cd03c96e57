"""Host memory of this process, as the kernel counts it.

The accelerator counts device memory (`Accelerator.peak_memory_bytes`).
"""

from __future__ import annotations

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_rss_bytes() -> int | None:
    """Return the largest resident memory that this process has had, in bytes.

    It counts pages of mapped files too, and memory that this process shares with others.

    Returns:
        Bytes, or None on a system that does not report them (Windows).
    """
    # VmHWM is better than `ru_maxrss`. Linux passes `ru_maxrss` on through fork and exec, so a small process that a
    # large one started reports the large one's peak. VmHWM starts afresh with the program.
    peak = _from_status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def anonymous_bytes() -> int | None:
    """Return the present memory of this process that is its own and has no file behind it, in bytes.

    This is the memory of tensors, without the libraries and mapped checkpoints that `peak_rss_bytes` counts.

    Returns:
        Bytes, or None on a system that does not report them (other than Linux).
    """
    return _from_status("RssAnon")


def format_bytes(num_bytes: int) -> str:
    """Write a number of bytes for people, in binary units.

    >>> format_bytes(1536), format_bytes(3 * 2**30)
    ('1.5 KiB', '3.0 GiB')
    """
    if abs(num_bytes) < 1024:
        return f"{num_bytes} B"
    size = float(num_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if abs(size) < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def _from_status(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024  # the kernel writes "123 kB" and means KiB
    return None
