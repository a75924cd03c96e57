"""The harness itself: what it passes on, and that it fails where the ranks fail."""

from pathlib import Path

import pytest

from tests.multi.ranks import run_ranks


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


def test_every_rank_runs_the_script_with_its_arguments(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        "import os, sys\n"
        "print(f\"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: {sys.argv[1:]}\\n\", end='', flush=True)\n",
    )
    output = run_ranks(path, 2, "--steps", 3).stdout
    assert sorted(output.split("\n"))[-2:] == [f"rank {rank} of 2: ['--steps', '3']" for rank in (0, 1)]


def test_a_rank_that_fails_is_an_assertion_error_with_its_output(tmp_path: Path) -> None:
    path = script(tmp_path, "import os\nif os.environ['RANK'] == '1': raise SystemExit('out of cheese')\n")
    with pytest.raises(AssertionError, match="out of cheese"):
        run_ranks(path, 2)
    assert run_ranks(path, 2, expected_rc=None).returncode != 0


def test_success_where_a_failure_was_expected_is_an_assertion_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exited with 0, expected a failure"):
        run_ranks(script(tmp_path, "pass\n"), 1, expected_rc=None)


def test_ranks_that_hang_are_killed(tmp_path: Path) -> None:
    path = script(tmp_path, "import time\nprint('waiting', flush=True)\ntime.sleep(600)\n")
    with pytest.raises(AssertionError, match="did not end within 8 s"):
        run_ranks(path, 2, timeout=8)
