"""Measure a piece of a fresh process: what its memory is at its peak, with pages and page cache made ready before.

The child calls `measured` around what is measured; the parent, which called `run_watched`, looks at the child's memory
every two milliseconds meanwhile, from outside: a thread of the child would wait for the interpreter's lock.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_BEGIN, _END = b"\0begin\n", b"\0end\n"
_FIELDS = {"host_bytes": "VmRSS", "anonymous_bytes": "RssAnon"}  # as /proc/PID/status calls them


def run_watched(command: Sequence[str]) -> dict[str, Any]:
    """Run a Python script that uses `measured` and `report`.

    Args:
        command: The script and its arguments.

    Returns:
        What it reported, and what the measured piece added to `anonymous_bytes` and, mapped files included, to
        `host_bytes`; neither where the system does not tell (other than Linux).

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
            said = b""
            base: dict[str, int] = {}
            peak: dict[str, int] = {}
            while True:
                watching = _BEGIN in said and _END not in said
                if select.select([process.stdout], [], [], 0.002 if watching else None)[0]:
                    data = os.read(process.stdout.fileno(), 1 << 16)
                    if not data:
                        break
                    said += data
                if watching:
                    peak |= {name: max(peak[name], now) for name, now in _memory(process.pid, peak).items()}
                elif _BEGIN in said and _END not in said:
                    base = _memory(process.pid, _FIELDS)
                    peak = dict(base)
                    process.stdin.write(b"go\n")
            process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stdin.close()
            process.stdout.close()
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read().decode(errors='replace')}")
    reported: dict[str, Any] = json.loads(said.splitlines()[-1])
    return {**reported, **{name: peak[name] - base[name] for name in peak}}


@contextmanager
def measured() -> Iterator[None]:
    """Surround what `run_watched` is to look at."""
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
    size_bytes = min(most_bytes, _fields("/proc/meminfo")["MemAvailable"] * 4 // 5)
    with mmap.mmap(-1, max(size_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory[:: mmap.PAGESIZE] = bytes(-(-len(memory) // mmap.PAGESIZE))


def _say(words: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(words)
    sys.stdout.buffer.flush()


def _memory(pid: int, names: Iterable[str]) -> dict[str, int]:
    fields = _fields(f"/proc/{pid}/status")
    return {name: fields[_FIELDS[name]] for name in names if _FIELDS[name] in fields}


def _fields(path: str) -> dict[str, int]:
    """Return the sizes in bytes that a file of the kernel's lists; none where there is no such file any more."""
    try:
        lines = Path(path).read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    found = (line.split() for line in lines if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in found}  # it writes kB and means KiB
