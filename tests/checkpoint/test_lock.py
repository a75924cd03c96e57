"""One job at a time saves to a place, and nobody waits for the dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nucleate.checkpoint.disk.lock import SaveLock
from nucleate.errors import CheckpointError

HOLD = """
import sys, time, pathlib
from nucleate.checkpoint.disk.lock import SaveLock
lock = SaveLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


def test_the_lock_of_a_living_process_is_respected_and_that_of_a_dead_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "c"
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(CheckpointError, match=f"under way, by process {process.pid} on "):
        SaveLock(path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert os.listdir(tmp_path) == [".c.lock"]
    SaveLock(path).release()
    assert os.listdir(tmp_path) == []


def test_a_child_that_was_forked_meanwhile_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = SaveLock(tmp_path / "c")
    pid = os.fork()
    if pid == 0:
        time.sleep(100)
        os._exit(0)
    lock.release()
    SaveLock(tmp_path / "c").release()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_who_waits_gets_the_lock_when_it_is_free(tmp_path: Path) -> None:
    first = SaveLock(tmp_path / "c")
    order: list[str] = []

    def wait() -> None:
        lock = SaveLock(tmp_path / "c", wait=True)
        order.append("second")
        lock.release()

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    order.append("first")
    first.release()
    thread.join(10)
    assert order == ["first", "second"]
    assert os.listdir(tmp_path) == []


def test_a_holder_whose_name_cannot_be_read_is_another_process(tmp_path: Path) -> None:
    lock = SaveLock(tmp_path / "c")
    (tmp_path / ".c.lock").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="under way, by another process"):
        SaveLock(tmp_path / "c")
    lock.release()
