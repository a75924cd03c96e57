"""Peak memory of this process between two points, and pages that are there when the clock starts. Linux only.

The peak is the kernel's own high-water mark, so that nothing has to run beside the code that is measured and no
peak is too short to be seen.
"""

from __future__ import annotations

import mmap
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # proc_pid_clear_refs(5)


def prefault(size_bytes: int) -> None:
    """Take, touch and give back memory, so that a virtual machine's host has to find none while the clock runs."""
    with mmap.mmap(-1, max(size_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory[:: mmap.PAGESIZE] = bytes(-(-len(memory) // mmap.PAGESIZE))


def available_bytes() -> int:
    """Return how much the machine has to give without swapping."""
    return _kib("MemAvailable", Path("/proc/meminfo")) * 1024


class Peak:
    """Counts from its making on.

    `VmHWM` counts mapped files as well. They are taken off as they are at the end, so library pages that were first
    touched after the peak, a few MiB at most, make the number that much too small.
    """

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        self._base = _kib("RssAnon")

    def added_bytes(self) -> int:
        """Return the most anonymous memory since then, less what there was."""
        return max(0, _kib("VmHWM") - _kib("RssFile") - _kib("RssShmem") - self._base) * 1024


def _kib(field: str, path: Path = _STATUS) -> int:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise RuntimeError(f"{path} has no {field}")
