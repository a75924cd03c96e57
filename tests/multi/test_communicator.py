"""The communicator between real processes."""

from pathlib import Path

from tests.multi.ranks import fork_ranks
from tests.multi.scripts.communicator import CHECKS

SCRIPT = Path(__file__).parent / "scripts" / "communicator.py"


def test_every_promise_of_the_communicator_holds_on_two_ranks() -> None:
    output = fork_ranks(SCRIPT, 2).stdout
    assert all(output.count(check.__name__) == 2 for check in CHECKS)


def test_every_promise_of_the_communicator_holds_on_three_ranks() -> None:
    output = fork_ranks(SCRIPT, 3).stdout
    assert all(output.count(check.__name__) == 3 for check in CHECKS)
