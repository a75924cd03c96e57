"""The process group of a single Python process, and who may end it."""

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from nucleate.cluster import Environment, process_group
from nucleate.errors import ConfigurationError

CPU = torch.device("cpu")
MINUTE = timedelta(minutes=1)


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_single_process_gets_a_group_without_a_launcher() -> None:
    assert not process_group.is_running()
    process_group.start(Environment(), "gloo", MINUTE, CPU)
    assert process_group.is_running()
    assert dist.get_world_size() == 1
    dist.all_reduce(torch.ones(1))


def test_starting_twice_keeps_the_group_and_stopping_ends_it() -> None:
    process_group.start(Environment(), "gloo", MINUTE, CPU)
    group = dist.group.WORLD
    process_group.start(Environment(), "gloo", MINUTE, CPU)
    assert dist.group.WORLD is group
    process_group.stop()
    assert not process_group.is_running()
    process_group.stop()
    process_group.start(Environment(), "gloo", MINUTE, CPU)
    assert process_group.is_running()
    process_group.stop()


def test_a_group_that_the_user_started_is_used_and_never_ended() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    process_group.start(Environment(), "gloo", MINUTE, CPU)
    process_group.stop()
    assert process_group.is_running()


def test_a_group_of_another_size_than_the_environment_says_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.raises(ConfigurationError, match="rank 0 of 1, but the launcher's environment says rank 1 of 2"):
        process_group.start(Environment("torchrun", world_size=2, global_rank=1), "gloo", MINUTE, CPU)


def test_a_gloo_group_beside_another_names_the_device_that_the_other_is_bound_to() -> None:
    process_group.start(Environment(), "gloo", MINUTE, CPU)
    group = dist.group.WORLD
    assert group is not None
    assert process_group.gloo_beside(group) == "gloo"

    class Bound:
        bound_device_id = torch.device("xpu", 1)

    assert process_group.gloo_beside(Bound()) == "cpu:gloo,xpu:gloo"  # type: ignore[arg-type]
    beside = dist.new_group(backend="cpu:gloo,xpu:gloo")
    objects: list[object] = [None]
    dist.all_gather_object(objects, "said", group=beside)
    assert objects == ["said"]
