"""Every way to start two ranks, with every strategy and every end: 24 of 24 restarts equal one run, and so on."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from tests.multi.test_restarts import check_data_fault, check_restart, check_termination

WAYS = ("torchrun", "script", "function", "spawn")
STRATEGIES = ("ddp", "fsdp")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the ends of processes are those of Linux")


@pytest.mark.parametrize(
    ("way", "strategy", "fault"), [*itertools.product(WAYS, STRATEGIES, ("error", "exit", "killed"))]
)
def test_ranks_start_again_from_the_last_checkpoint(tmp_path: Path, way: str, strategy: str, fault: str) -> None:
    check_restart(tmp_path, way, strategy, fault, "drawn" if strategy == "ddp" else "loader")


@pytest.mark.parametrize("data", ["drawn", "loader", "workers"])
@pytest.mark.parametrize(("way", "strategy", "target"), [*itertools.product(WAYS, STRATEGIES, ("all", "one rank"))])
def test_a_run_that_sigterm_ended_goes_on_where_it_was(
    tmp_path: Path, way: str, strategy: str, target: str, data: str
) -> None:
    check_termination(tmp_path, way, strategy, target, data)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("fault", "data"), [("dataset", "loader"), ("dataset", "workers"), ("worker", "workers")])
def test_a_fault_of_the_data_on_one_rank_ends_all_with_its_traceback(
    tmp_path: Path, way: str, fault: str, data: str
) -> None:
    check_data_fault(tmp_path, way, fault, data)
