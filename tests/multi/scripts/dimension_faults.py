"""Runs the tests of the suite that must fail for faulty dimensions, each with the message that it must have."""

from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "faulty_dimensions.py"

FAULTS = {
    "TestWorks::test_its_constructor_does_no_work": "the constructor computes",
    "TestBroadcasts::test_apply_exchanges_nothing_and_makes_no_values": "`apply` exchanges values",
    "TestMakesValues::test_apply_exchanges_nothing_and_makes_no_values": "`apply` makes the values of",
    "TestDraws::test_apply_exchanges_nothing_and_makes_no_values": "`apply` draws random numbers",
    "TestSaysOther::test_the_layout_is_the_one_that_placements_said": "blocks.0.up.weight on rank 0",
    "TestSaysTensors::test_placements_are_plain_data_for_a_thousand_ranks": "compute with tensors",
    "TestSplitsNothing::test_each_rank_holds_the_parts_that_its_layout_says": "no tensor is split",
    "TestThaws::test_gradients_and_trained_weights_are_those_of_a_plain_loop": "blocks.0.up",
    "TestForgetsDropout::test_ranks_with_the_same_data_drop_the_same_values": "not close",
    "TestTakesFusedForPlain::test_losses_follow_those_of_a_plain_loop": "not close",
}


class Messages:
    """The messages of tests that failed."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.texts.append(report.longreprtext)


if __name__ == "__main__":
    for test, message in FAULTS.items():
        seen = Messages()
        status = pytest.main(["-x", "-q", f"{FILE}::{test}"], plugins=[seen])
        assert status == pytest.ExitCode.TESTS_FAILED, f"{test} ended with {status!r}"
        assert message in seen.texts[0], f"{test}: {seen.texts[0]}"
        print(f"{test} is a fault", flush=True)
