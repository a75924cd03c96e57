"""The communicator of a single process: the shapes and types are those of many."""

import pytest
import torch

from nucleate.cluster import Communicator, Environment
from nucleate.errors import ConfigurationError


@pytest.fixture
def communicator() -> Communicator:
    return Communicator(Environment(), torch.device("cpu"))


def test_broadcast_returns_the_very_object(communicator: Communicator) -> None:
    obj = {"a": torch.ones(1), "b": object()}
    assert communicator.broadcast(obj) is obj


def test_broadcast_from_a_rank_that_is_not_there_is_refused(communicator: Communicator) -> None:
    with pytest.raises(ConfigurationError, match="from rank 1, but the ranks are 0 to 0"):
        communicator.broadcast(1, src=1)


def test_all_gather_adds_the_leading_axis_also_for_one_rank(communicator: Communicator) -> None:
    got = communicator.all_gather({"a": torch.ones(2, 3), "b": [1, 2.0], "c": "text"})
    assert got["a"].shape == (1, 2, 3)
    assert got["b"][0].tolist() == [1]
    assert got["b"][1].tolist() == [2.0]
    assert got["c"] == "text"


def test_all_gather_carries_gradients_only_when_asked(communicator: Communicator) -> None:
    mine = torch.ones(2, requires_grad=True)
    assert not communicator.all_gather(mine).requires_grad
    communicator.all_gather(mine, sync_grads=True).sum().backward()
    assert mine.grad is not None
    assert mine.grad.tolist() == [1, 1]


def test_results_do_not_share_memory_with_their_inputs(communicator: Communicator) -> None:
    mine = torch.zeros(2)
    communicator.all_gather(mine).add_(1)
    communicator.all_reduce(mine).add_(1)
    assert mine.tolist() == [0, 0]


@pytest.mark.parametrize("reduce_op", ["mean", "avg", "sum", "min", "max", "product"])
def test_all_reduce_of_one_rank_is_the_value_itself(communicator: Communicator, reduce_op: str) -> None:
    assert communicator.all_reduce(torch.tensor([3.0, 4.0]), reduce_op).tolist() == [3, 4]
    assert communicator.all_reduce(3, reduce_op).item() == 3


def test_the_mean_of_integers_is_floating_point(communicator: Communicator) -> None:
    assert communicator.all_reduce(torch.tensor(3)).dtype == torch.float32


def test_an_unknown_reduce_op_is_refused_with_what_is_allowed(communicator: Communicator) -> None:
    with pytest.raises(ConfigurationError, match="'median'; allowed are 'mean', 'sum', 'min'"):
        communicator.all_reduce(1.0, "median")
    with pytest.raises(ConfigurationError, match="complex"):
        communicator.all_reduce(torch.tensor(1j), "max")


def test_all_or_none_lets_the_error_through(communicator: Communicator) -> None:
    with communicator.all_or_none("nothing"):
        pass
    with pytest.raises(ZeroDivisionError), communicator.all_or_none("dividing"):
        _ = 1 / 0
    communicator.barrier()
    assert communicator.gather_objects("mine") == ["mine"]
