"""The harness itself: what it passes on, and that it fails where the ranks fail."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.multi.ranks import fork_ranks, fork_unattended, run_ranks

Run = Callable[..., Any]
both = pytest.mark.parametrize("run", [run_ranks, fork_ranks])


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


@both
def test_every_rank_runs_the_script_with_its_arguments(run: Run, tmp_path: Path) -> None:
    path = script(
        tmp_path,
        "import os, sys\n"
        "print(f\"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: {sys.argv[1:]}\\n\", end='', flush=True)\n",
    )
    output = run(path, 2, "--steps", 3).stdout
    assert sorted(output.split("\n"))[-2:] == [f"rank {rank} of 2: ['--steps', '3']" for rank in (0, 1)]


@both
def test_a_rank_that_fails_is_an_assertion_error_with_its_output(run: Run, tmp_path: Path) -> None:
    path = script(tmp_path, "import os\nif os.environ['RANK'] == '1': raise SystemExit('out of cheese')\n")
    with pytest.raises(AssertionError, match="out of cheese"):
        run(path, 2)
    assert run(path, 2, expected_rc=None).returncode != 0


@both
def test_success_where_a_failure_was_expected_is_an_assertion_error(run: Run, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exited with 0, expected a failure"):
        run(script(tmp_path, "pass\n"), 1, expected_rc=None)


@pytest.mark.parametrize(("run", "timeout"), [(run_ranks, 8), (fork_ranks, 3)])
def test_ranks_that_hang_are_killed(run: Run, timeout: int, tmp_path: Path) -> None:
    path = script(tmp_path, "import time\nprint('waiting', flush=True)\ntime.sleep(600)\n")
    with pytest.raises(AssertionError, match=f"did not end within {timeout} s"):
        run(path, 2, timeout=timeout)


def test_a_forked_rank_that_fails_ends_the_others_unless_nobody_watches(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        "import os, time\n"
        "if os.environ['RANK'] == '1': raise SystemExit('out of cheese')\n"
        "time.sleep(float(os.environ.get('TORCHELASTIC_USE_AGENT_STORE') and 600 or 1))\n",
    )
    assert fork_ranks(path, 2, expected_rc=None, timeout=60).stderr == "out of cheese\n"
    codes, _, err = fork_unattended(path, 2, timeout=60)
    assert (codes, err) == ([0, 1], "out of cheese\n")


def test_a_forked_rank_ends_as_a_script_does(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        "import atexit, os, signal, sys, threading, time\n"
        "atexit.register(print, 'exit functions')\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('threads'))).start()\n"
        "if sys.argv[1] == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n",
    )
    assert fork_ranks(path, 1, "in peace").stdout == "threads\nexit functions\n"
    assert fork_ranks(path, 1, "killed", expected_rc=-signal.SIGKILL).stdout == ""
