"""Saves again and again, each time killed one step later; run by test_kill.py in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from nucleate.checkpoint import load, save
from nucleate.cluster import Communicator, Environment

STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def kill_at(step: int) -> None:
    """Kill this process just before its next-but-`step` change to the file system."""
    left = step

    def count(event: str, args: Any) -> None:
        nonlocal left
        if event in STEPS:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    fsync = os.fsync

    def counted(descriptor: int) -> None:
        count("os.rename", ())
        fsync(descriptor)

    os.fsync = counted


def main(parent: Path) -> None:
    solo = Communicator(Environment(), torch.device("cpu"))
    path = parent / "c"

    def state(number: int) -> dict[str, Any]:
        return {"number": number, "first": torch.full((1000,), float(number)), "second": torch.tensor(float(number))}

    save(path, state(0), solo)
    current, kept, replaced, stranded = 0, 0, 0, 0
    for step in range(1000):
        pid = os.fork()
        if pid == 0:
            kill_at(step)
            save(path, state(step + 1), solo)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        stranded += not path.exists()
        found = load(path, None, solo)
        assert found["number"] in (current, step + 1), found["number"]
        assert found["first"].unique().tolist() == [found["second"].item()] == [float(found["number"])]
        kept += found["number"] == current
        replaced += found["number"] == step + 1
        current = found["number"]
        if os.waitstatus_to_exitcode(status) == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert current == step + 1
    assert os.listdir(parent) == ["c"], os.listdir(parent)
    print(f"steps={step} kept={kept} replaced={replaced} stranded={stranded}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
