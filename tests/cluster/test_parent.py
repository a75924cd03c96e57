"""The end of a process with its parent: by the kernel or by a thread, and never with a thread of the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import nucleate.cluster.parent as parent_module

PARENT = parent_module.__file__
#: The time after which a process that should have ended counts as living.
LIMIT_S = 5.0
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

CHILD = """
    import importlib.util, os, sys, threading, time
    specification = importlib.util.spec_from_file_location("parent", {path!r})
    parent = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(parent)
    {change}
    if {in_thread}:
        thread = threading.Thread(target=parent.bind, args=(os.getppid(),))
        thread.start()
        thread.join()
    else:
        parent.bind(os.getppid())
    print(os.getpid(), len(threading.enumerate()), flush=True)
    time.sleep(100)
"""
STARTER = """
    import subprocess, sys, threading, time
    children = []
    def start():
        children.append(subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, text=True))
        print(children[-1].stdout.readline(), end="", flush=True)
    if {in_thread}:
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
    else:
        start()
    time.sleep(100)
"""
#: Instead of the kernel or its descriptors, as on systems that have no such thing.
NO_SIGNAL = "parent._ask_the_kernel = lambda: False"
NO_DESCRIPTOR = f"{NO_SIGNAL}; parent._descriptor = lambda process: None; parent._POLL_S = 0.1"


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def ends(pid: int) -> bool:
    end = time.monotonic() + LIMIT_S
    while lives(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not lives(pid)


@contextmanager
def family(change: str = "", started_in_thread: bool = False, bound_in_thread: bool = False) -> Iterator[list[int]]:
    """Start a process that starts a bound one; give the ids of both, and the number of the bound one's threads."""
    child = textwrap.dedent(CHILD).format(path=PARENT, change=change, in_thread=bound_in_thread)
    program = textwrap.dedent(STARTER).format(child=child, in_thread=started_in_thread)
    starter = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = 0
    try:
        assert starter.stdout is not None
        pid, num_threads = map(int, starter.stdout.readline().split())
        yield [starter.pid, pid, num_threads]
    finally:
        starter.kill()
        starter.communicate()
        if pid and lives(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("change", "bound_in_thread", "num_threads"),
    [("", False, 1), ("", True, 2), (NO_SIGNAL, False, 2), (NO_DESCRIPTOR, False, 2)],
)
def test_a_bound_process_ends_with_its_parent(change: str, bound_in_thread: bool, num_threads: int) -> None:
    with family(change, bound_in_thread=bound_in_thread) as (parent, child, threads):
        assert threads == num_threads
        time.sleep(0.2)
        assert lives(child)
        os.kill(parent, signal.SIGKILL)
        assert ends(child)


def test_the_end_of_the_thread_that_started_a_process_does_not_end_it() -> None:
    with family(started_in_thread=True) as (parent, child, _):
        # The thread has begun to end. The kernel would have sent its signal within milliseconds.
        time.sleep(0.5)
        assert lives(child)
        os.kill(parent, signal.SIGKILL)
        assert ends(child)


def test_the_kernels_signal_alone_would_come_at_the_end_of_a_thread() -> None:
    # The reason for all of this; the test fails if Linux changes.
    change = "parent._was_made_by_main_thread = lambda process: True"
    with family(change, started_in_thread=True) as (parent, child, _):
        assert ends(child)
        assert lives(parent)


def test_a_program_that_was_started_through_the_file_is_bound() -> None:
    program = (
        "import os, subprocess, sys, time\n"
        f"command = [sys.executable, '-I', '-S', {PARENT!r}, str(os.getpid()), '/bin/sleep', '100']\n"
        "print(subprocess.Popen(command).pid, flush=True)\n"
        "time.sleep(100)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    end = time.monotonic() + LIMIT_S
    while Path(f"/proc/{pid}/comm").read_text() != "sleep\n" and time.monotonic() < end:
        time.sleep(0.02)
    assert lives(pid)
    starter.kill()
    starter.communicate()
    assert ends(pid)


def test_a_process_whose_parent_has_ended_already_ends_at_once() -> None:
    program = (
        f"import runpy; bind = runpy.run_path({PARENT!r})['bind']\n"
        "import subprocess, sys, time\n"
        "ended = subprocess.Popen([sys.executable, '-S', '-c', '']); ended.wait()\n"
        "bind(ended.pid); time.sleep(100)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=30, check=False).returncode == 1
