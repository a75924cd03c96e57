"""The suite of dimensions fails for dimensions with a fault, on the test that names the fault."""

from pathlib import Path

from tests.multi.ranks import fork_ranks

SCRIPT = Path(__file__).parent / "scripts" / "dimension_faults.py"


def test_each_fault_of_a_dimension_is_found_by_the_test_for_it() -> None:
    assert fork_ranks(SCRIPT, 2, timeout=200).stdout.count(" is a fault") == 2 * 10
