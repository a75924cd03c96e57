"""The last step after SIGTERM: all ranks end after the same one."""

from pathlib import Path

from tests.multi.ranks import fork_ranks

SCRIPT = Path(__file__).parent / "scripts" / "sigterm.py"


def test_ranks_that_are_apart_agree_on_their_last_step() -> None:
    done = fork_ranks(SCRIPT, 3)
    assert done.stdout.count("agreed") == 3
