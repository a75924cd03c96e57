"""Measure a piece of a fresh process, and hold the process to a memory limit.

The child calls `measured` around what is measured; the parent, which called `run_watched`, looks at the child's memory
every two milliseconds meanwhile, from outside: a thread of the child would wait for the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import platform
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_BEGIN, _END = b"\0begin\n", b"\0end\n"
# As /proc/PID/status calls them. Pages of mapped files stand apart: the kernel takes them back when memory is short.
_FIELDS = {"host_bytes": ("RssAnon", "RssShmem", "VmSwap"), "mapped_bytes": ("RssFile",)}


def run_watched(command: Sequence[str], limit_bytes: int | None = None, mapped_bytes: int = 0) -> dict[str, Any]:
    """Run a Python script that uses `measured` and `report`.

    With a limit, two things stop the process. This function kills it as soon as its own memory passes the limit; files
    that it maps do not count, as in a container. And the kernel refuses it private address space (`RLIMIT_DATA`) beyond
    the limit plus `mapped_bytes`, so that it cannot outrun the first. A memory control group would do both, but a
    process may rarely make one; `systemd-run --user --scope -p MemoryMax=8G -p MemorySwapMax=0 python ...` does, and a
    process that is killed by it is reported in the same way.

    Args:
        command: The script and its arguments.
        limit_bytes: How much memory the whole process may take.
        mapped_bytes: How much it may map from files in private; `RLIMIT_DATA` counts that, though it takes no memory.

    Returns:
        What the script reported, what the measured piece added to `host_bytes` and `mapped_bytes` at its peak, and the
        peak `process_bytes` of the whole process. Sizes are absent where the system does not tell them (other than
        Linux). For a process that ran out of memory: `killed_s`, the seconds since the start of the measured piece.

    Raises:
        SystemExit: The script failed.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if limit_bytes is not None:
                most_bytes = limit_bytes + mapped_bytes
                resource.prlimit(process.pid, resource.RLIMIT_DATA, (most_bytes, most_bytes))
            said = b""
            base: dict[str, int] = {}
            peak: dict[str, int] = {}
            started = time.perf_counter()
            while True:
                watching = _BEGIN in said and _END not in said
                if select.select([process.stdout], [], [], 0.002 if watching else None)[0]:
                    data = os.read(process.stdout.fileno(), 1 << 16)
                    if not data:
                        break
                    said += data
                if watching:
                    peak |= {name: max(peak[name], now) for name, now in _memory(process.pid).items()}
                    if limit_bytes is not None and peak["host_bytes"] > limit_bytes:
                        process.kill()
                elif _BEGIN in said and _END not in said:
                    base = _memory(process.pid)
                    peak = dict(base)
                    started = time.perf_counter()
                    process.stdin.write(b"go\n")
            killed_s = time.perf_counter() - started
            process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stdin.close()
            process.stdout.close()
        errors.seek(0)
        complaint = errors.read().decode(errors="replace")
    if process.returncode:
        refused = re.search("MemoryError|can(no|')t allocate memory", complaint, re.IGNORECASE)
        if process.returncode == -signal.SIGKILL or (limit_bytes is not None and refused):
            return {"killed_s": killed_s}
        raise SystemExit(f"{' '.join(command)} failed:\n{complaint}")
    reported: dict[str, Any] = json.loads(said.splitlines()[-1])
    reported |= {name: peak[name] - base[name] for name in peak}
    return reported | ({"process_bytes": peak["host_bytes"]} if peak else {})


@contextmanager
def measured() -> Iterator[None]:
    """Surround what `run_watched` is to look at."""
    gc.collect()
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed, but not given back, would be taken for free again
    _say(_BEGIN)
    sys.stdin.readline()  # The parent has seen what there was before.
    yield
    _say(_END)


def report(values: dict[str, Any]) -> None:
    """Hand values to the parent; the last thing that a script does."""
    _say(f"\n{json.dumps(values)}\n".encode())


def make_ready(files: Iterable[Path], most_bytes: int) -> None:
    """Read files into the page cache, and take, touch and give back memory.

    The host of a virtual machine takes back what is idle, page cache and free memory alike; without this the clock
    would run while it looks for some.

    Args:
        files: What will be read.
        most_bytes: What may be needed; at most four fifths of what the machine has to give are touched.
    """
    buffer = bytearray(1 << 23)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    if sys.platform != "linux":
        return
    size_bytes = min(most_bytes, available_bytes() * 4 // 5)
    with mmap.mmap(-1, max(size_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory[:: mmap.PAGESIZE] = bytes(-(-len(memory) // mmap.PAGESIZE))


def available_bytes() -> int:
    """Return how much memory the machine has to give; page cache counts, which the kernel takes back."""
    return _fields("/proc/meminfo")["MemAvailable"]


def _say(words: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(words)
    sys.stdout.buffer.flush()


def _memory(pid: int) -> dict[str, int]:
    fields = _fields(f"/proc/{pid}/status")
    return {name: sum(fields.get(part, 0) for part in parts) for name, parts in _FIELDS.items() if parts[0] in fields}


def _fields(path: str) -> dict[str, int]:
    """Return the sizes in bytes that a file of the kernel's lists; none where there is no such file any more."""
    try:
        lines = Path(path).read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    found = (line.split() for line in lines if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in found}  # it writes kB and means KiB
