"""Saves again and again, each time killed somewhere else; run by test_kill.py in a process of its own."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nucleate.checkpoint import load, save
from nucleate.checkpoint.disk.series import resolve
from nucleate.cluster import Communicator, Environment

STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}
SOLO = Communicator(Environment(), torch.device("cpu"))


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
    fsync, pwrite = os.fsync, os.pwrite

    def counted(descriptor: int) -> None:
        count("os.rename", ())
        fsync(descriptor)

    def counted_write(*args: Any) -> int:
        count("os.rename", ())
        return pwrite(*args)

    os.fsync, os.pwrite = counted, counted_write


def kill_some_time(longest_s: float, step: int) -> None:
    """Kill this process at a random moment of the next `longest_s` seconds."""
    if os.fork() == 0:  # not by this process, which may be anywhere
        time.sleep(random.Random(step).uniform(0, longest_s))
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)


def state(number: int, numel: int) -> dict[str, Any]:
    return {
        "number": number,
        "first": torch.full((numel,), float(number)),
        "second": torch.tensor(float(number)),
        "last": torch.full((numel,), float(number)),
    }


def read(path: Path) -> float:
    """Return the number of the checkpoint at `path`, after all of it has been compared."""
    found = resolve(path)
    if found.suffix == ".pt":
        tensors = torch.load(found, weights_only=True)
    elif found.suffix == ".safetensors":
        tensors = load_file(found)
    elif (found / ".metadata").exists():
        tensors = load(path, None, SOLO)
    else:
        tensors = {key: t for file in found.glob("model*.safetensors") for key, t in load_file(file).items()}
        assert (found / "config.json").read_text() == "config"
    number = tensors["second"].item()
    assert tensors["first"].unique().tolist() == tensors["last"].unique().tolist() == [number]
    return number


def save_one(path: Path, format: str | None, number: int, numel: int) -> None:
    save(path, state(number, numel), SOLO, format=format, max_shard_size=numel * 5)


def until_it_survives(path: Path, format: str | None, duration_s: float | None, numel: int, tries: int) -> None:
    """Save over and over in forked processes that are killed, and look at what is there after each.

    Args:
        path: Where.
        format: In which format.
        duration_s: About how long a save takes, to be killed at random moments; None to be killed step by step.
        numel: How large the tensors are.
        tries: How often at most.
    """
    current, kept, replaced, stranded = 0.0, 0, 0, 0
    whole = 0
    longest_s = duration_s or 0.0
    for number in range(1, tries + 1):
        pid = os.fork()
        if pid == 0:
            kill_at(number - 1) if duration_s is None else kill_some_time(longest_s, number)
            save_one(path, format, number, numel)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        stranded += not path.exists()
        found = read(path)
        assert found in (current, number), found
        kept += found == current
        replaced += found == number
        current = found
        if os.waitstatus_to_exitcode(status) == 0:
            whole += 1
            assert found == number
            if duration_s is None:
                break
            longest_s *= 0.8
        else:
            longest_s *= 1.2
            assert os.WTERMSIG(status) == signal.SIGKILL
    save_one(path, format, number + 1, numel)
    assert read(path) == number + 1
    assert os.listdir(path.parent) == [path.name], os.listdir(path.parent)
    print(f"steps={number - 1} kept={kept} replaced={replaced} stranded={stranded} whole={whole}")


def series_until_it_survives(folder: Path, format: str | None, suffix: str) -> None:
    """Save a series into forked processes that are killed step by step, and look at what a last save leaves there."""
    number, steps = 0, -1
    status = 1
    while status:
        number, steps = number + 2, steps + 1
        pid = os.fork()
        if pid == 0:
            kill_at(steps)
            save_step(folder, format, suffix, number - 1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert read(folder / "latest") in (number - 2, number - 1)
        save_step(folder, format, suffix, number)
        left = {name for name in os.listdir(folder) if name not in ("latest", f"step-{number}{suffix}")}
        # Of the killed one and the one before it, the newer whole one stays.
        assert len(left) == 1, left
    print(f"steps={steps}")


def save_step(folder: Path, format: str | None, suffix: str, number: int) -> None:
    save(folder / f"step-{number}{suffix}", state(number, 1000), SOLO, format=format, keep_last=2)


def main(path: Path, format: str | None, how: str) -> None:
    torch.set_num_threads(1)  # OpenMP's do not survive a fork.
    numel = 1000 if how == "steps" else 2_000_000
    if how == "series":
        path.mkdir()
        save_step(path, format, ".pt" if format is None else "", 0)
        series_until_it_survives(path, format, ".pt" if format is None else "")
        return
    if format == "safetensors":
        path.mkdir()
        (path / "config.json").write_text("config")
    save_one(path, format, 0, numel)
    if how == "steps":
        until_it_survives(path, format, None, numel, 1000)
        return
    begin = time.perf_counter()
    save_one(path, format, 0, numel)
    duration_s = time.perf_counter() - begin

    until_it_survives(path, format, duration_s, numel, 30)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] or None, sys.argv[3])
