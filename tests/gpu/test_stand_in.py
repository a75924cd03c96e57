"""On the simulated device: what is skipped there cannot run there. It needs no GPU, and does not run on one."""

from __future__ import annotations

import pytest

from tests.gpu.device import IS_SIMULATED, REASONS


@pytest.mark.skipif(not IS_SIMULATED, reason="it speaks of the simulated device")
@pytest.mark.parametrize("reason", REASONS)
def test_the_reason_for_which_tests_are_skipped_is_true(reason: str) -> None:
    assert REASONS[reason].is_true(), REASONS[reason].text
