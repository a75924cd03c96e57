"""Any sequence of operations builds the same deferred as eagerly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.deferred.equality import assert_exact
from tests.deferred.idioms.program import Instruction, Program, programs


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs)
def test_random_programs_are_exact(program: list[Instruction]) -> None:
    generator = torch.get_rng_state()
    try:
        assert_exact(lambda: Program(program))
    finally:
        torch.set_rng_state(generator)
