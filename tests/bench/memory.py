"""Peak memory of this process between two points, and pages that are there when the clock starts. Linux only.

The peak is the kernel's own high-water mark, so that nothing has to run beside the code that is measured and no
peak is too short to be seen.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

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


def cached_bytes() -> int:
    """Return how much of files the machine holds in memory."""
    return _kib("Cached", Path("/proc/meminfo")) * 1024


class Peak:
    """Counts from its making on.

    `VmHWM` counts mapped files as well. They are taken off as they are at the end, so library pages that were first
    touched after the peak, a few MiB at most, make the number that much too small.
    """

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        self._base = _kib("RssAnon")
        self._base_rss = _kib("VmRSS")

    def added_bytes(self) -> int:
        """Return the most anonymous memory since then, less what there was."""
        return max(0, _kib("VmHWM") - _kib("RssFile") - _kib("RssShmem") - self._base) * 1024

    def added_rss_bytes(self) -> int:
        """Return the most memory since then, mapped files included, less what there was."""
        return max(0, _kib("VmHWM") - self._base_rss) * 1024


class SampledPeak:
    """The peak of anonymous memory where files are mapped meanwhile, which `Peak` cannot tell from it.

    Another process looks every few milliseconds: a thread of this one would wait for the interpreter's lock. What
    comes and goes in between is not seen.
    """

    _PROGRAM = """
import select, sys
page, highest = int(sys.argv[2]), 0
with open(f"/proc/{sys.argv[1]}/statm", "rb", buffering=0) as statm:
    print(flush=True)
    while True:
        last = select.select([sys.stdin], [], [], 0.004)[0]
        statm.seek(0)
        _, resident, shared, *_ = statm.read().split()
        highest = max(highest, (int(resident) - int(shared)) * page)
        if last:
            break
print(highest)
"""

    def __init__(self) -> None:
        arguments = [sys.executable, "-IS", "-c", self._PROGRAM, str(os.getpid()), str(mmap.PAGESIZE)]
        self._watcher = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read().readline()
        self._base = _kib("RssAnon")

    def added_bytes(self) -> int:
        """Return the most that was seen, less what there was at first; looks no longer."""
        highest = int(self._watcher.communicate()[0])
        return max(0, highest - self._base * 1024)

    def _read(self) -> IO[str]:
        assert self._watcher.stdout is not None
        return self._watcher.stdout


def _kib(field: str, path: Path = _STATUS) -> int:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise RuntimeError(f"{path} has no {field}")
