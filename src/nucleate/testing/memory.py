"""Peak memory of a piece of code, measured in a separate process.

Only anonymous memory is counted (the kernel's `RssAnon`): the memory of tensors, without libraries and mapped files.
The kernel does not keep a peak of this number, so another process reads it continuously. This can miss a peak that is
shorter than about a millisecond.
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

# After the set-up, the child writes to the file descriptor `ready` and waits until its memory has been read.
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
    """The memory that a statement used.

    Attributes:
        before_bytes: The anonymous memory after the set-up.
        peak_bytes: The peak of anonymous memory while the statement ran.
    """

    before_bytes: int
    peak_bytes: int

    @property
    def added_bytes(self) -> int:
        """The memory that the statement added at its peak."""
        return self.peak_bytes - self.before_bytes


def peak_memory(statement: str, setup: str = "", timeout_s: float = 300) -> PeakMemory:
    """Run Python code in a new process and measure its peak of anonymous memory. This works only on Linux.

    Examples:
        >>> peak = peak_memory("b = bytearray(64 * 2**20)")
        >>> 60 * 2**20 < peak.added_bytes < 80 * 2**20
        True

    Args:
        statement: The code to measure.
        setup: Code that runs before the statement and is not measured, such as imports. The statement sees its names.
        timeout_s: The number of seconds after which the process is killed.

    Raises:
        UsageError: The system does not report the memory of processes (it is not Linux).
        AssertionError: The code failed or did not end in time; the message contains its output.
    """
    if not Path("/proc/self/status").exists():
        raise UsageError(f"peak_memory reads /proc, which {sys.platform} does not have. Measure on Linux.")
    ready, write = os.pipe()
    program = _CHILD.format(setup=setup, statement=statement, ready=write)
    # Output goes to a file: a full pipe that nobody reads would stop the process.
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
    """Fail if `statement` adds `limit_bytes` or more to the anonymous memory of a new process.

    Args:
        limit_bytes: The limit of the memory that the statement adds at its peak.
        statement: The code to measure.
        setup: Code that runs before the statement and is not measured.
        timeout_s: The number of seconds after which the process is killed.

    Returns:
        The measured memory.

    Raises:
        AssertionError: The statement adds `limit_bytes` or more, or fails.
    """
    peak = peak_memory(statement, setup, timeout_s)
    assert peak.added_bytes < limit_bytes, (
        f"at its peak, the statement added {format_bytes(peak.added_bytes)} to {format_bytes(peak.before_bytes)}; "
        f"the limit is {format_bytes(limit_bytes)}."
    )
    return peak


def _anonymous_bytes(pid: int) -> int:
    """Return the anonymous memory of another process, or 0 if the process has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    _, _, rest = status.partition("RssAnon:")
    return int(rest.split()[0]) * 1024 if rest else 0
