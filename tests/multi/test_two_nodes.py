"""Two nodes of one rank each. `tests/nodes` has two ranks each, and nodes that die."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nodes.jobs import check_training


@pytest.mark.long
def test_two_nodes_train_and_save_as_eager(tmp_path: Path) -> None:
    check_training(tmp_path, 1)
