"""Two nodes: training, saves and loads on two ranks each, and the end of one node with the other.

These tests need root and namespaces. Where these are refused, as in most containers, each test is skipped and says why,
also under CI.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nodes.jobs import check_training, end_of_other, start_endless
from tests.nodes.nodes import nodes_or_skip

#: The promise: a node ends this long after another one.
LIMIT_S = 10.0


def test_fsdp_and_hsdp_train_and_save_over_nodes_and_equal_eager(tmp_path: Path) -> None:
    check_training(tmp_path, 2)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_node_ends_when_all_processes_of_the_other_are_killed(dead: int) -> None:
    with nodes_or_skip() as nodes:
        start_endless(nodes)
        nodes[dead].kill()
        assert end_of_other(nodes[1 - dead]) < LIMIT_S


def test_a_node_ends_when_the_cable_of_the_other_is_pulled() -> None:
    with nodes_or_skip() as nodes:
        start_endless(nodes)
        nodes[1].pull_cable()
        assert end_of_other(nodes[0]) < LIMIT_S
