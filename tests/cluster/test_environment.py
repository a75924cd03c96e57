"""Where this process stands: torchrun's variables, a single process, and what is refused."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nucleate.cluster.environment import Environment
from nucleate.errors import ConfigurationError

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in TORCHRUN.items() if name not in names}


def test_no_variables_mean_a_single_process() -> None:
    assert Environment.detect({}) == Environment()
    assert Environment() == Environment("python", 1, 0, 0, 1, 0)


def test_torchruns_variables_are_read() -> None:
    environment = Environment.detect(TORCHRUN)
    assert environment == Environment("torchrun", 8, 5, 1, 4, 1, store_address="localhost:29500")
    assert environment.num_nodes == 2


def test_the_environment_of_the_process_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert Environment.detect() == Environment.detect(TORCHRUN)


def test_the_launchers_name_of_the_run_is_read_and_absent_for_ranks_started_by_hand() -> None:
    assert Environment.detect({**TORCHRUN, "TORCHELASTIC_RUN_ID": "none"}).run_id == "none"
    assert Environment.detect(TORCHRUN).run_id == ""


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_rank_without_a_world_is_a_single_process(name: str) -> None:
    assert Environment.detect(without(name)) == Environment()


@pytest.mark.parametrize("missing", [["MASTER_ADDR"], ["MASTER_PORT"], ["MASTER_ADDR", "MASTER_PORT"]])
def test_ranks_that_cannot_find_each_other_are_refused(missing: list[str]) -> None:
    with pytest.raises(ConfigurationError, match=" and ".join(missing)):
        Environment.detect(without(*missing))


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"])
@pytest.mark.parametrize("value", ["", "two", "1.5"])
def test_what_is_not_a_number_is_refused_by_name_and_value(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is {value!r}"):
        Environment.detect({**TORCHRUN, name: value})


@given(nodes=st.integers(1, 8), per_node=st.integers(1, 8), data=st.data())
def test_what_torchrun_leaves_out_follows_from_the_rank(nodes: int, per_node: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, nodes * per_node - 1))
    whole = {
        "RANK": str(rank),
        "WORLD_SIZE": str(nodes * per_node),
        "LOCAL_WORLD_SIZE": str(per_node),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }
    environment = Environment.detect(whole)
    assert environment.node_rank * per_node + environment.local_rank == rank
    assert environment.num_nodes == nodes
    assert environment == Environment.detect(
        {**whole, "LOCAL_RANK": str(rank % per_node), "GROUP_RANK": str(rank // per_node)}
    )


def test_one_node_is_meant_where_the_local_world_is_not_given() -> None:
    environment = Environment.detect(without("LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"))
    assert (environment.local_rank, environment.node_rank, environment.num_nodes) == (5, 0, 1)


def test_importing_reads_nothing() -> None:
    program = (
        "import os, collections\n"
        "class Env(collections.UserDict):\n"
        "    def __getitem__(self, name):\n"
        "        assert name not in ('RANK', 'WORLD_SIZE'), name\n"
        "        return super().__getitem__(name)\n"
        "    def get(self, name, default=None):\n"
        "        assert name not in ('RANK', 'WORLD_SIZE'), name\n"
        "        return super().get(name, default)\n"
        "import torch, torch.distributed\n"
        "os.environ = Env(os.environ)\n"
        "import nucleate.cluster.environment\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
