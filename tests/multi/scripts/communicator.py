"""What the communicator promises, checked on every rank of a real group; run by test_communicator.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from nucleate.cluster import Communicator
from nucleate.errors import ConfigurationError, RankDisagreementError, RankFailedError, UsageError
from tests.multi.device import ACCELERATOR, start_group


@dataclass
class Batch:
    inputs: torch.Tensor
    label: str


def broadcast_sends_tensors_anywhere(comm: Communicator) -> None:
    mine = {
        "tensor": torch.full((2, 3), float(comm.rank)).t(),
        "nested": [torch.tensor(comm.rank), (torch.zeros(0, 4), {"text": f"from {comm.rank}"})],
        "batch": Batch(torch.tensor([True, False]).logical_xor(torch.tensor(comm.rank == 1)), f"{comm.rank}"),
        "number": comm.rank,
        "odd": [torch.tensor([1 + 2j]), torch.tensor([3], dtype=torch.int16), torch.ones(2).to(torch.float8_e4m3fn)],
    }
    got = comm.broadcast(mine, src=1)
    assert torch.equal(got["tensor"], torch.ones(3, 2))
    assert got["nested"][0].item() == 1
    assert got["nested"][1][0].shape == (0, 4)
    assert got["nested"][1][1] == {"text": "from 1"}
    assert got["batch"].inputs.tolist() == [False, True]
    assert got["batch"].label == "1"
    assert got["number"] == 1
    assert got["odd"][0].item() == 1 + 2j
    assert got["odd"][1].dtype == torch.int16
    assert got["odd"][2].float().tolist() == [1, 1]


def broadcast_of_what_cannot_be_pickled_fails_everywhere(comm: Communicator) -> None:
    expected = RankFailedError if comm.rank != 0 else (AttributeError, TypeError, Exception)
    with pytest.raises(expected):
        comm.broadcast(lambda: None)
    with pytest.raises(ConfigurationError, match="from rank 7"):
        comm.broadcast(1, src=7)


def all_gather_stacks_along_a_new_axis(comm: Communicator) -> None:
    ranks = list(range(comm.world_size))
    data = {"a": torch.tensor([[comm.rank]]), "b": (comm.rank, float(comm.rank), comm.rank == 0), "c": "as it is"}
    got = comm.all_gather(data)
    assert got["a"].tolist() == [[[rank]] for rank in ranks]
    assert got["b"][0].tolist() == ranks
    assert got["b"][0].dtype == torch.int64
    assert got["b"][1].dtype == torch.float32
    assert got["b"][2].tolist() == [rank == 0 for rank in ranks]
    assert got["c"] == "as it is"
    assert comm.all_gather(torch.zeros(0, 2)).shape == (comm.world_size, 0, 2)
    for dtype in (torch.bool, torch.int16, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.complex64):
        part = torch.full((3, 2), comm.rank).to(dtype).t()
        whole = comm.all_gather(part)
        assert whole.dtype == dtype
        assert whole.shape == (comm.world_size, 2, 3)
        assert whole[comm.rank].float().equal(part.float()) if not dtype.is_complex else whole[comm.rank].equal(part)
    assert not comm.all_gather(torch.ones(1, requires_grad=True)).requires_grad


def all_gather_lets_gradients_flow_back(comm: Communicator) -> None:
    mine = torch.full((2,), float(comm.rank), requires_grad=True)
    gathered = comm.all_gather(mine, sync_grads=True)
    weight = torch.arange(comm.world_size * 2, dtype=torch.float32).view(comm.world_size, 2) * (comm.rank + 1)
    (gathered * weight).sum().backward()
    total = sum(range(1, comm.world_size + 1))
    assert mine.grad is not None
    assert mine.grad.tolist() == [total * (2.0 * comm.rank), total * (2.0 * comm.rank + 1)]


def disagreeing_shapes_are_an_error_on_every_rank(comm: Communicator) -> None:
    with pytest.raises(
        RankDisagreementError, match=rf"tensor 1 is float32 \(1,\) on {ACCELERATOR}(:0)? on rank 0 but float32 \(2,\)"
    ):
        comm.all_gather([torch.ones(1), torch.ones(1 + min(comm.rank, 1))])
    with pytest.raises(RankDisagreementError, match="brings 1 tensors but rank 1 brings 2"):
        comm.all_reduce([1.0] * (1 + min(comm.rank, 1)))
    with pytest.raises(RankDisagreementError, match="int64"):
        comm.all_reduce(torch.ones(1, dtype=torch.int64 if comm.rank else torch.int32))
    comm.barrier()


def all_reduce_combines_and_keeps_its_input(comm: Communicator) -> None:
    world = comm.world_size
    mine = torch.tensor([float(comm.rank), 1.0])
    assert comm.all_reduce(mine).tolist() == [(world - 1) / 2, 1.0]
    assert mine.tolist() == [comm.rank, 1.0]
    assert comm.all_reduce(mine, "sum").tolist() == [sum(range(world)), world]
    assert comm.all_reduce({"n": comm.rank}, "max")["n"].item() == world - 1
    assert comm.all_reduce(comm.rank + 1, "product").item() == torch.arange(1, world + 1).prod()
    integer_mean = comm.all_reduce(torch.tensor(comm.rank))
    assert integer_mean.is_floating_point()
    assert integer_mean.item() == (world - 1) / 2
    assert comm.all_reduce(torch.tensor(200, dtype=torch.uint8), "sum").item() == 200 * world
    assert comm.all_reduce(torch.tensor(comm.rank, dtype=torch.int16), "min").dtype == torch.int16
    assert comm.all_reduce(torch.tensor(comm.rank == 0), "max").item() is True
    assert comm.all_reduce(torch.tensor(60000.0, dtype=torch.float16)).item() == 60000
    assert comm.all_reduce(torch.tensor(1 + comm.rank * 1j), "sum").item() == world + sum(range(world)) * 1j
    assert comm.all_reduce(torch.ones(1).to(torch.float8_e4m3fn), "avg").dtype == torch.float8_e4m3fn
    assert not comm.all_reduce(torch.ones(1, requires_grad=True)).requires_grad
    with pytest.raises(ConfigurationError, match="'median'; allowed are 'mean'"):
        comm.all_reduce(1.0, "median")


def a_group_of_ranks_gathers_and_reduces_alone(comm: Communicator) -> None:
    last = comm.world_size - 1
    alone = [dist.new_group([rank]) for rank in range(comm.world_size)]
    pair = dist.new_group([0, last])
    assert comm.all_reduce(comm.rank, "sum", alone[comm.rank]).item() == comm.rank
    if comm.rank in (0, last):
        assert comm.all_reduce(comm.rank, dist.ReduceOp.SUM, pair).item() == last
        assert comm.all_reduce(float(comm.rank), "avg", pair).item() == last / 2
        mine = torch.full((2,), float(comm.rank), requires_grad=True)
        gathered = comm.all_gather(mine, sync_grads=True, group=pair)
        assert gathered.tolist() == [[0, 0], [last, last]]
        (gathered * torch.tensor([[1.0], [2.0]])).sum().backward()
        assert mine.grad is not None
        assert mine.grad.tolist() == ([2, 2] if comm.rank == 0 else [4, 4])
    else:
        with pytest.raises(UsageError, match=rf"all_gather: rank {comm.rank} is not in the group"):
            comm.all_gather(torch.ones(1), group=pair)
    assert comm.all_reduce(1, "sum", dist.group.WORLD).item() == comm.world_size


def a_sharded_tensor_stands_for_its_whole_value(comm: Communicator) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh(ACCELERATOR, (comm.world_size,))
    sharded = distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])
    assert comm.all_reduce(sharded).tolist() == list(range(6))
    assert comm.all_gather(sharded).shape == (comm.world_size, 6)
    with pytest.raises(RankFailedError if comm.rank else UsageError, match="DTensor cannot be broadcast"):
        comm.broadcast(sharded)


def raise_on(comm: Communicator, rank: int, error: BaseException) -> None:
    if comm.rank == rank:
        raise error


def an_error_on_one_rank_reaches_the_others(comm: Communicator) -> None:
    with comm.all_or_none("nothing"):
        pass
    with pytest.raises((ValueError, RankFailedError)) as caught, comm.all_or_none("writing the file"):
        raise_on(comm, 1, ValueError("the disk is full"))
    if comm.rank == 1:
        assert type(caught.value) is ValueError
    else:
        assert isinstance(caught.value, RankFailedError)
        assert "writing the file failed on rank 1" in str(caught.value)
        assert "ValueError: the disk is full" in str(caught.value)
        assert "an_error_on_one_rank" in str(caught.value)
    with pytest.raises(ZeroDivisionError), comm.all_or_none("dividing"):
        _ = 1 / 0
    with pytest.raises((OSError, RankFailedError)), comm.all_or_none("outer"), comm.all_or_none("inner"):
        raise_on(comm, 0, OSError("no such disk"))
    # CheckpointException of torch is a BaseException.
    with pytest.raises((SystemExit, RankFailedError)), comm.all_or_none("ending"):
        raise_on(comm, 0, SystemExit(3))
    assert comm.gather_objects({"rank": comm.rank}) == [{"rank": rank} for rank in range(comm.world_size)]


CHECKS: list[Callable[[Communicator], None]] = [
    broadcast_sends_tensors_anywhere,
    broadcast_of_what_cannot_be_pickled_fails_everywhere,
    all_gather_stacks_along_a_new_axis,
    all_gather_lets_gradients_flow_back,
    disagreeing_shapes_are_an_error_on_every_rank,
    all_reduce_combines_and_keeps_its_input,
    a_group_of_ranks_gathers_and_reduces_alone,
    a_sharded_tensor_stands_for_its_whole_value,
    an_error_on_one_rank_reaches_the_others,
]

if __name__ == "__main__":
    start_group()
    communicator = start_group()
    assert dist.get_world_size() == communicator.world_size
    for check in CHECKS:
        check(communicator)
        sys.stdout.write(f"{check.__name__}\n")
