"""Arguments of `Runtime` and of strategies that only several ranks can show."""

from __future__ import annotations

from pathlib import Path

from tests.multi.ranks import fork_ranks

SCRIPTS = Path(__file__).parent / "scripts"


def test_the_process_group_has_the_backend_that_the_strategy_asks_for() -> None:
    done = fork_ranks(SCRIPTS / "backends.py", 2)
    assert done.stdout.count("the group has cpu:gloo\n") == 2


def test_ranks_of_another_launcher_find_each_other_by_a_given_environment() -> None:
    done = fork_ranks(SCRIPTS / "given_environment.py", 2)
    assert done.stdout.count("without torchrun's variables") == 2
