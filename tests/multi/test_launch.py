"""The ranks that `devices=2` starts: by the script again or by a function, and how they end, whatever happens."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.multi.programs import all_end, run, started, wait_for_ranks

SCRIPTS = Path(__file__).parent / "scripts"
SCRIPT = str(SCRIPTS / "launch.py")
WAYS = ("script", "function")
EXITED = "rank 1 of 2 ended first, with the exit code 3. It left no traceback."
KILLED = "rank 1 of 2 was killed first, by SIGKILL (signal 9). It left no traceback."
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.mark.parametrize("way", [*WAYS, "spawn", "forkserver"])
def test_ranks_start_and_the_first_process_ends_with_them(way: str) -> None:
    done = run(SCRIPT, way, "none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("PID ") == 2
    assert re.findall(r"^(?:ranks|result) \d+", done.stdout, re.MULTILINE) == (
        ["ranks 2"] * 2 if way == "script" else ["result 2"]
    )
    assert done.stderr == ""


@pytest.mark.parametrize("way", ["script", "forkserver", pytest.param("function", marks=pytest.mark.long)])
def test_the_first_traceback_comes_at_once_and_as_the_last_lines(way: str) -> None:
    with started(SCRIPT, way, "error") as process:
        pids = wait_for_ranks(process)
        assert all_end([*pids, process.pid])
        _, shown = process.communicate()
    assert process.returncode == 1
    assert shown.rstrip().splitlines()[-1] == "ValueError: out of cheese"
    assert len(re.findall("^(?:.rank1.: )?ValueError: out of cheese$", shown, re.MULTILINE)) == 2
    assert "rank 1 of 2 failed first:" in shown
    assert "left no exception" not in shown
    # Neither the consequence on rank 0 nor what the agent says about it.
    assert shown.count("Traceback") == (2 if way == "script" else 3)
    assert "ChildFailedError" not in shown
    assert "elastic" not in shown


@pytest.mark.parametrize(
    ("way", "fault", "code", "last"),
    [
        pytest.param("script", "exit", 3, EXITED, marks=pytest.mark.long),
        ("function", "exit", 3, EXITED),
        ("script", "killed", 137, KILLED),
        pytest.param("function", "killed", 137, KILLED, marks=pytest.mark.long),
    ],
)
def test_the_exit_code_of_the_first_rank_is_kept(way: str, fault: str, code: int, last: str) -> None:
    with started(SCRIPT, way, fault) as process:
        pids = wait_for_ranks(process)
        assert all_end([*pids, process.pid])
        _, shown = process.communicate()
    assert process.returncode == code
    assert shown.rstrip().splitlines()[-1] == last


@pytest.mark.parametrize(
    ("way", "number", "code"),
    [
        ("script", signal.SIGINT, 130),
        pytest.param("script", signal.SIGTERM, 143, marks=pytest.mark.long),
        pytest.param("function", signal.SIGINT, -2, marks=pytest.mark.long),
        ("function", signal.SIGTERM, -15),
        ("script", signal.SIGKILL, -9),
        pytest.param("function", signal.SIGKILL, -9, marks=pytest.mark.long),
        pytest.param("spawn", signal.SIGKILL, -9, marks=pytest.mark.long),
        ("forkserver", signal.SIGKILL, -9),
        pytest.param("forkserver", signal.SIGINT, -2, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_the_first_process_ends_all(way: str, number: int, code: int) -> None:
    with started(SCRIPT, way, "wait") as process:
        pids = wait_for_ranks(process)
        process.send_signal(number)
        assert all_end([*pids, process.pid])
        assert process.wait() == code


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_a_killed_rank_ends_all(way: str) -> None:
    with started(SCRIPT, way, "wait") as process:
        pids = wait_for_ranks(process)
        os.kill(pids[0], signal.SIGKILL)
        assert all_end([*pids, process.pid])
        assert process.wait() == 137


def test_one_process_launches_several_functions_and_is_as_before() -> None:
    done = run(str(SCRIPTS / "launch_twice.py"))
    assert done.returncode == 0, done.stderr
    assert "as before" in done.stdout


@pytest.mark.long
def test_two_jobs_run_on_one_machine_at_once() -> None:
    with started(SCRIPT, "script", "none") as first, started(SCRIPT, "function", "none") as second:
        assert (first.wait(200), second.wait(200)) == (0, 0)


@pytest.mark.long
def test_a_module_runs_again_as_a_module() -> None:
    done = run("-m", "tests.multi.scripts.launch", "script", "none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ranks 2") == 2


def test_a_program_from_a_pipe_can_only_run_functions() -> None:
    program = (
        "from nucleate import Runtime\n"
        "from nucleate.errors import UsageError\n"
        "runtime = Runtime(accelerator='cpu', devices=2)\n"
        "def work(runtime, *args): return runtime.global_rank, runtime.world_size, args\n"
        "try: runtime.barrier()\n"
        "except UsageError as error: print(error)\n"
        "print(Runtime(accelerator='cpu', devices=2).launch(work, 5))\n"
    )
    done = run("-", stdin=program)
    assert done.returncode == 0, done.stderr
    assert "runs the script again in each process, but the program was not read from a file" in done.stdout
    assert "runtime.launch(main)" in done.stdout
    assert done.stdout.rstrip().endswith("(0, 2, (5,))")


def test_a_notebook_runs_functions_in_forks() -> None:
    """A kernel has a prompt, a loop that runs, threads, a stream of its own, and no file of its program."""
    program = """
import asyncio, io, sys, threading
class Stream(io.TextIOBase):
    def write(self, text): return shown.write(text)
shown, sys.stdout, sys.ps1 = sys.stdout, Stream(), "In : "
threading.Thread(target=threading.Event().wait, daemon=True).start()
import torch
from nucleate import Runtime
from nucleate.errors import RankFailedError, UsageError
torch.randn(500, 500) @ torch.randn(500, 500)
CELL = '''
def work(runtime, step):
    if step == 2 and runtime.global_rank == 1: raise ValueError("out of cheese")
    torch.randn(500, 500) @ torch.randn(500, 500)
    return runtime.global_rank, int(runtime.all_reduce(step, reduce_op="sum"))
runtime = Runtime(accelerator="cpu", devices=2)
for step in range(3):
    try: print(runtime.launch(work, step))
    except RankFailedError as error: print(str(error).splitlines()[-1])
try: Runtime(accelerator="cpu", devices=2).barrier()
except UsageError as error: print(error)
try: Runtime(accelerator="cpu", devices=2, strategy="ddp_spawn").launch(work, 0)
except UsageError as error: print(error)
'''
async def cell(): exec(compile(CELL, "<ipython-input-1>", "exec"), globals())
asyncio.run(cell())
"""
    done = run("-", stdin=program)
    assert done.returncode == 0, done.stderr
    first, second, error, again, spawned = done.stdout.rstrip().splitlines()
    assert (first, second, error) == ("(0, 0)", "(0, 2)", "ValueError: out of cheese")
    assert "but this is an interactive session" in again
    assert spawned.startswith("start_method='spawn' starts new processes, and they cannot find `work`")


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from nucleate import Runtime\n"
        "def work(runtime): pass\n"
        "Runtime(accelerator='cpu', devices=2, strategy='ddp_spawn').launch(work)\n"
    )
    done = run(str(script))
    assert done.returncode == 1
    assert "below `if __name__ == '__main__':`" in done.stderr
