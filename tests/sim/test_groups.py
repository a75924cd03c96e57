"""Several ranks on simulated devices: saves, meshes and collectives beside a backend that gloo does not name."""

from pathlib import Path

import pytest

from tests.multi.ranks import run_ranks


@pytest.mark.parametrize(("num_ranks", "group"), [(2, "ours"), (2, "the user's"), (4, "ours")])
def test_ranks_train_save_and_load_on_their_devices(num_ranks: int, group: str, tmp_path: Path) -> None:
    output = run_ranks("tests.sim.scripts.groups", num_ranks, tmp_path, num_ranks, group, timeout=240).stdout
    assert output.count("done") == num_ranks
