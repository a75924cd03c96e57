"""How much memory a piece of code takes at its peak, measured in a process of its own.

Only anonymous memory is counted (the kernel's `RssAnon`): what tensors take, without libraries and mapped files.
The kernel keeps no high-water mark of it, so another process reads it all the time; a peak of less than about a
millisecond can be missed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nucleate.errors import UsageError
from nucleate.report import format_bytes

# After the set-up it writes to the file descriptor `ready`, and waits until its memory has been read.
_CHILD = """
import os, sys
namespace = {{"__name__": "__main__"}}
exec(compile({setup!r}, "<setup>", "exec"), namespace)
os.write({ready}, b"ready")
sys.stdin.readline()
exec(compile({statement!r}, "<statement>", "exec"), namespace)
"""


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """What a statement took.

    Attributes:
        before_bytes: Anonymous memory after the set-up.
        peak_bytes: The most anonymous memory while the statement ran.
    """

    before_bytes: int
    peak_bytes: int

    @property
    def added_bytes(self) -> int:
        """What the statement added at its peak."""
        return self.peak_bytes - self.before_bytes


def peak_memory(statement: str, setup: str = "", timeout_s: float = 300) -> PeakMemory:
    """Run Python code in a fresh process and measure its peak of anonymous memory. Linux only.

    Examples:
        >>> peak = peak_memory("b = bytearray(64 * 2**20)")
        >>> 60 * 2**20 < peak.added_bytes < 80 * 2**20
        True

    Args:
        statement: The code to measure.
        setup: Code that runs before, such as imports, and is not measured. It shares the statement's names.
        timeout_s: Seconds after which the process is killed.

    Raises:
        UsageError: The system does not tell (it is not Linux).
        AssertionError: The code failed; the message carries its output.
    """
    if not Path("/proc/self/status").exists():
        raise UsageError(f"peak_memory reads /proc, which {sys.platform} does not have. Measure on Linux.")
    ready, write = os.pipe()
    program = _CHILD.format(setup=setup, statement=statement, ready=write)
    # Output goes to a file: a pipe that nobody empties would stop a process that prints much.
    with tempfile.TemporaryFile("w+") as output, os.fdopen(ready, "rb") as signal:
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=[write],
        )
        os.close(write)
        before = peak = 0
        try:
            if signal.read(5) and process.stdin is not None:
                before = peak = _anonymous_bytes(process.pid)
                process.stdin.write("\n")
                process.stdin.close()
            peak = _watch(process, timeout_s, peak)
        finally:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        if process.returncode != 0:
            output.seek(0)
            raise AssertionError(f"the measured code failed or did not end in {timeout_s} s:\n{output.read()}")
    return PeakMemory(before, peak)


def _watch(process: subprocess.Popen[str], timeout_s: float, peak: int) -> int:
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(0.0005)
    return peak


def assert_peak_memory_below(limit_bytes: int, statement: str, setup: str = "", timeout_s: float = 300) -> PeakMemory:
    """Fail where `statement` adds `limit_bytes` or more to the anonymous memory of a fresh process.

    Args:
        limit_bytes: The limit for what the statement adds at its peak.
        statement: The code to measure.
        setup: Code that runs before and is not measured.
        timeout_s: Seconds after which the process is killed.

    Raises:
        AssertionError: It adds more, or fails.
    """
    peak = peak_memory(statement, setup, timeout_s)
    assert peak.added_bytes < limit_bytes, (
        f"at its peak it added {format_bytes(peak.added_bytes)} to {format_bytes(peak.before_bytes)}; "
        f"the limit is {format_bytes(limit_bytes)}."
    )
    return peak


def _anonymous_bytes(pid: int) -> int:
    """Return the anonymous memory of another process; 0 where it has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    _, _, rest = status.partition("RssAnon:")
    return int(rest.split()[0]) * 1024 if rest else 0
