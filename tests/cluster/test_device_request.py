"""The request for processes and devices: every form that is allowed, and what is refused with the value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nucleate.cluster import Environment
from nucleate.cluster.device_request import DeviceRequest
from nucleate.errors import ConfigurationError

ALONE = Environment()
FOUR = Environment("torchrun", world_size=4, local_world_size=4, global_rank=1, local_rank=1)


def resolve(devices: Any, found: Environment = ALONE, there: int = 8, shared: bool = False) -> Environment:
    return DeviceRequest.parse(devices).resolve(found, lambda: there, shared)


@pytest.mark.parametrize("devices", ["auto", " AUTO ", None, 1, "1", [0], (3,), "0,", "5,", range(1)])
def test_one_process_starts_nothing(devices: Any) -> None:
    assert resolve(devices) == ALONE


@pytest.mark.parametrize(
    ("devices", "num", "indices"),
    [
        (2, 2, (0, 1)),
        ("2", 2, (0, 1)),
        ([0, 1], 2, (0, 1)),
        ([5, 2, 3], 3, (5, 2, 3)),
        ("0, 1", 2, (0, 1)),
        ("3,1,", 2, (3, 1)),
        (range(2, 4), 2, (2, 3)),
        (-1, 8, range(8)),
        ("-1", 8, range(8)),
    ],
)
def test_several_processes_are_planned_each_with_its_device(devices: Any, num: int, indices: Any) -> None:
    request = DeviceRequest.parse(devices)
    environment = request.resolve(ALONE, lambda: 8, False)
    assert environment == replace(ALONE, world_size=num, local_world_size=num, is_planned=True)
    assert [request.index(rank) for rank in range(num)] == list(indices)


def test_processes_share_a_cpu_in_any_number_and_all_of_it_is_one() -> None:
    assert resolve(5, there=2, shared=True).world_size == 5
    assert resolve([7, 9], there=2, shared=True).world_size == 2
    assert resolve(-1, there=2, shared=True) == ALONE


@pytest.mark.parametrize("devices", ["auto", None, 4, "4", -1, [0, 1, 2, 3], "0,1,2,3"])
def test_what_a_launcher_started_is_kept(devices: Any) -> None:
    assert resolve(devices, FOUR) == FOUR


@pytest.mark.parametrize("devices", [1, 2, "8", [0, 1], "0,"])
def test_another_number_than_a_launcher_started_is_refused(devices: Any) -> None:
    with pytest.raises(ConfigurationError, match="but torchrun started 4"):
        resolve(devices, FOUR)


@pytest.mark.parametrize(
    "devices",
    [
        0,
        -2,
        "0",
        "-3",
        "",
        "many",
        "1.5",
        1.5,
        True,
        [],
        "a,b",
        ",",
        "0,-1",
        [0, -1],
        [True],
        ["0"],
        [0.0],
        {0, 1},
        b"0",
    ],
)
def test_other_values_are_refused_with_what_is_allowed(devices: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        DeviceRequest.parse(devices)
    assert str(caught.value).startswith(f"devices={devices!r} ")
    assert "It may be 'auto', a number of processes" in str(caught.value)


def test_a_device_that_is_named_twice_is_refused_by_its_index() -> None:
    with pytest.raises(ConfigurationError, match=r"devices=\[0, 2, 2\] names 2 twice"):
        DeviceRequest.parse([0, 2, 2])


@pytest.mark.parametrize("found", [ALONE, FOUR])
def test_devices_that_the_node_lacks_are_refused(found: Environment) -> None:
    devices = [*range(found.world_size - 1), 9]
    with pytest.raises(ConfigurationError, match=r"names 9, but this node has 8 .* Give indices below 8"):
        resolve(devices, found)
    with pytest.raises(ConfigurationError, match="asks for 9 processes, but this node has 8"):
        resolve(9)


@pytest.mark.parametrize("num_nodes", [0, -1, True, "2", 1.0])
def test_a_number_of_nodes_is_an_integer(num_nodes: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"num_nodes={num_nodes!r}"):
        DeviceRequest.parse("auto", num_nodes)


def test_several_nodes_need_a_launcher() -> None:
    with pytest.raises(ConfigurationError, match="torchrun --nnodes 2 --nproc-per-node 3"):
        DeviceRequest.parse(3, 2).resolve(ALONE, lambda: 8, False)
    nodes = replace(FOUR, world_size=8)
    assert DeviceRequest.parse(4, 2).resolve(nodes, lambda: 8, False) == nodes
    with pytest.raises(ConfigurationError, match="ask for 4 processes"):
        DeviceRequest.parse(4, 1).resolve(nodes, lambda: 8, False)


@pytest.mark.parametrize("value", [-1, True, 1.0, None, "3"])
def test_a_wrong_number_of_restarts_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"max_restarts={value!r} must be an integer of at least 0"):
        DeviceRequest.parse(2, 1, value)


def test_restarts_need_processes_that_start_or_a_launcher() -> None:
    with pytest.raises(ConfigurationError, match="max_restarts=3 needs ranks that this process starts"):
        DeviceRequest.parse("auto", 1, 3).resolve(ALONE, lambda: 8, True)
    assert DeviceRequest.parse(2, 1, 3).resolve(ALONE, lambda: 8, True).is_planned
    assert DeviceRequest.parse("auto", 1, 3).resolve(FOUR, lambda: 8, True) == FOUR
