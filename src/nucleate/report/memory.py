"""How much host memory this process uses, as the kernel counts it.

Device memory is the accelerator's business (`Accelerator.peak_memory_bytes`).
"""

from __future__ import annotations

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_rss_bytes() -> int | None:
    """Return the most memory that this process has had resident, in bytes.

    It counts pages of mapped files too, and what this process shares with others.

    Returns:
        Bytes, or None on a system that does not tell (Windows).
    """
    # Not `ru_maxrss` where there is a choice: Linux hands it down through fork and exec, so that a small
    # process started by a large one reports the large one's peak. VmHWM starts afresh with the program.
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
    """Return the memory that is this process's own and backed by no file, in bytes, as it is now.

    This is what tensors take, without the libraries and mapped checkpoints that `peak_rss_bytes` counts.

    Returns:
        Bytes, or None on a system that does not tell (other than Linux).
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
