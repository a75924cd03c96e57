"""Training runs that are interrupted, and go on from their last checkpoint: the curve of losses is that of one run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from tests.multi.programs import started, variables
from tests.multi.ranks import ROOT

SCRIPT = str(Path(__file__).parent / "scripts" / "restarts.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the ends of processes are those of Linux")


def command(folder: Path, way: str, *options: str, restarts: int = 0) -> list[str]:
    """Return the command that trains on two ranks, started in one of four ways."""
    if way == "torchrun":
        return [*TORCHRUN, "--max-restarts", str(restarts), SCRIPT, str(folder), *options]
    return [SCRIPT, str(folder), "--way", way, "--devices", "2", "--restarts", str(restarts), *options]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    # torchrun gives each rank one thread.
    env = {**variables(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=ROOT, timeout=300, check=False
    )


def curve(folder: Path, rank: int) -> tuple[dict[int, str], int]:
    """Return the losses by step, which are equal where a step was made again, and the number of repeated steps."""
    lines = [line.split() for line in (folder / f"losses.{rank}").read_text().splitlines()]
    losses: dict[int, str] = {}
    for step, loss in lines:
        assert losses.setdefault(int(step), loss) == loss
    return losses, len(lines) - len(losses)


@cache
def whole(data: str, strategy: str) -> list[dict[int, str]]:
    """Return the losses of a run without an interruption, by rank."""
    folder = Path(mkdtemp())
    done = run(command(folder, "function", "--data", data, "--strategy", strategy))
    assert done.returncode == 0, done.stderr
    return [curve(folder, rank)[0] for rank in range(2)]


def check_restart(folder: Path, way: str, strategy: str, fault: str, data: str) -> None:
    options = ("--fault", fault, "--data", data, "--strategy", strategy)
    done = run(command(folder, way, *options, restarts=1))
    assert done.returncode == 0, done.stderr
    curves = [curve(folder, rank) for rank in range(2)]
    assert [losses for losses, _ in curves] == whole(data, strategy)
    # The fault came two steps after a save.
    assert [num_repeated for _, num_repeated in curves] == [2, 2]
    if way != "torchrun":
        assert re.search(r"^rank . of 2 .*All ranks start again: restart 1 of 1.$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("way", "strategy", "fault", "data"),
    [
        ("torchrun", "fsdp", "killed", "drawn"),
        pytest.param("script", "ddp", "exit", "loader", marks=pytest.mark.long),
        ("function", "ddp", "error", "drawn"),
    ],
)
def test_ranks_start_again_from_the_last_checkpoint(
    tmp_path: Path, way: str, strategy: str, fault: str, data: str
) -> None:
    check_restart(tmp_path, way, strategy, fault, data)


def terminate(folder: Path, way: str, target: str, *options: str) -> tuple[int, str]:
    """Run until both ranks train, send SIGTERM, and return the exit code and what was written to stderr."""
    found: list[int] = []
    with started(*command(folder, way, "--on-sigterm", "save", "--pause", "0.2", *options)) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found += map(int, re.findall(r"PID (\d+)", line))
            if len(found) == 2:
                break
        os.kill(process.pid if target == "all" else found[0], signal.SIGTERM)
        _, shown = process.communicate(timeout=100)
    return process.returncode, shown


def check_termination(folder: Path, way: str, strategy: str, target: str, data: str) -> None:
    code, shown = terminate(folder, way, target, "--data", data, "--strategy", strategy)
    ended = re.search(r"SIGTERM ended this run after (\d+) steps. It was saved as", shown)
    assert ended is not None, shown
    # torchrun has exit codes of its own, and a process that was told to end by a signal ends by it.
    by_signal = way in ("function", "spawn") and target == "all"
    assert code == (1 if way == "torchrun" else -signal.SIGTERM if by_signal else 143), shown
    before = [curve(folder, rank)[0] for rank in range(2)]
    assert {max(losses) for losses in before} == {int(ended[1])}
    done = run(command(folder, way, "--data", data, "--strategy", strategy))
    assert done.returncode == 0, done.stderr
    assert [curve(folder, rank) for rank in range(2)] == [(losses, 0) for losses in whole(data, strategy)]


def check_data_fault(folder: Path, way: str, fault: str, data: str) -> None:
    done = run(command(folder, way, "--fault", fault, "--data", data))
    assert done.returncode == 1
    message = "ValueError: out of cheese" if fault == "dataset" else r"RuntimeError: DataLoader worker \(pid"
    assert re.search(rf"^(?:\[rank1\]: )?{message}", done.stderr, re.MULTILINE), done.stderr
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("way", "strategy", "target", "data"),
    [
        ("torchrun", "fsdp", "all", "workers"),
        ("function", "ddp", "one rank", "drawn"),
    ],
)
def test_a_run_that_sigterm_ended_goes_on_where_it_was(
    tmp_path: Path, way: str, strategy: str, target: str, data: str
) -> None:
    check_termination(tmp_path, way, strategy, target, data)


def test_sigterm_before_any_save_ends_all_ranks_at_once(tmp_path: Path) -> None:
    code, shown = terminate(tmp_path, "script", "all", "--fault", "unsaved")
    assert code == 143
    assert len(re.findall(r"^rank . of 2 got SIGTERM: on_sigterm='save' repeats", shown, re.MULTILINE)) == 2
    assert not (tmp_path / "last").exists()


@pytest.mark.parametrize(("way", "fault"), [("torchrun", "worker"), ("script", "dataset")])
def test_a_fault_of_the_data_on_one_rank_ends_all_with_its_traceback(tmp_path: Path, way: str, fault: str) -> None:
    check_data_fault(tmp_path, way, fault, "workers")
