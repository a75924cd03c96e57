"""The ranks that `devices=2` starts: by the script again or by a function, and how they end, whatever happens."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.multi.ranks import ROOT

SCRIPTS = Path(__file__).parent / "scripts"
SCRIPT = str(SCRIPTS / "launch.py")
WAYS = ("script", "function")
EXITED = "rank 1 of 2 ended first, with the exit code 3. It left no traceback."
KILLED = "rank 1 of 2 was killed first, by SIGKILL (signal 9). It left no traceback."
#: The promise: after this time no process is left.
LIMIT_S = 5.0
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


def variables() -> dict[str, str]:
    place = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    found = {name: value for name, value in os.environ.items() if name not in place}
    return {**found, "PYTHONPATH": os.pathsep.join([str(ROOT), found.get("PYTHONPATH", "")])}


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables(),
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run(*command: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        input=stdin,
        capture_output=True,
        text=True,
        env=variables(),
        cwd=ROOT,
        timeout=200,
        check=False,
    )


def wait_for_ranks(process: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of both ranks, once both have begun to work."""
    assert process.stdout is not None
    found: list[int] = []
    for line in process.stdout:
        found += map(int, re.findall(r"PID (\d+)", line))
        if len(found) == 2:
            return found
    raise AssertionError(f"the ranks did not begin.\n{process.communicate()}")


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def all_end(pids: list[int]) -> bool:
    end = time.monotonic() + LIMIT_S
    while any(map(lives, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("way", [*WAYS, "spawn"])
def test_ranks_start_and_the_first_process_ends_with_them(way: str) -> None:
    done = run(SCRIPT, way, "none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("PID ") == 2
    assert re.findall(r"^(?:ranks|result) \d+", done.stdout, re.MULTILINE) == (
        ["ranks 2"] * 2 if way == "script" else ["result 2"]
    )
    assert done.stderr == ""


@pytest.mark.parametrize("way", ["script", pytest.param("function", marks=pytest.mark.long)])
def test_the_first_traceback_comes_at_once_and_as_the_last_lines(way: str) -> None:
    with started(SCRIPT, way, "error") as process:
        pids = wait_for_ranks(process)
        assert all_end([*pids, process.pid])
        _, shown = process.communicate()
    assert process.returncode == 1
    assert shown.rstrip().splitlines()[-1] == "ValueError: out of cheese"
    assert len(re.findall("^(?:.rank1.: )?ValueError: out of cheese$", shown, re.MULTILINE)) == 2
    assert "rank 1 of 2 failed first:" in shown
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
