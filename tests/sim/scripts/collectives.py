"""On each rank: the collectives that DDP, fully_shard, HSDP, DTensor and checkpoints use, with copies still queued."""

from __future__ import annotations

import copy
import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.sim.device import install

sim = install()
sim.set_late(True)
RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
DEVICE = torch.device("sim", RANK % 2)
SUM = sum(range(1, WORLD_SIZE + 1))


def mine(numel: int = 4) -> torch.Tensor:
    """This rank's number, on its way to the device."""
    host = torch.full((numel,), float(RANK + 1)).pin_memory()
    return host.to(DEVICE, non_blocking=True)


def holds(tensor: torch.Tensor, value: float) -> None:
    assert tensor.device == DEVICE
    assert (tensor.cpu() == value).all(), (tensor, value)


def reductions() -> None:
    for op, value in ((dist.ReduceOp.SUM, SUM), (dist.ReduceOp.AVG, SUM / WORLD_SIZE), (dist.ReduceOp.MAX, WORLD_SIZE)):
        x = mine()
        dist.all_reduce(x, op=op)
        holds(x, value)
        x = mine()
        work = dist.all_reduce(x, op=op, async_op=True)
        holds(work.get_future().wait()[0], value)
        work.wait()
        holds(x, value)
        x = mine()
        dist.reduce(x, 0, op=op)
        if RANK == 0:
            holds(x, value)
        out = torch.empty(4, device=DEVICE)
        dist.reduce_scatter(out, [mine() for _ in range(WORLD_SIZE)], op=op)
        holds(out, value)


def moves() -> None:
    x = mine()
    dist.broadcast(x, 0)
    holds(x, 1)
    outs = [torch.empty(4, device=DEVICE) for _ in range(WORLD_SIZE)]
    dist.all_gather(outs, mine())
    for rank, out in enumerate(outs):
        holds(out, rank + 1)
    dist.scatter(x, [mine() for _ in range(WORLD_SIZE)] if RANK == 0 else None, 0)
    holds(x, 1)
    dist.gather(mine(), outs if RANK == 0 else None, 0)
    dist.all_to_all_single(x := torch.empty(WORLD_SIZE, device=DEVICE), mine(WORLD_SIZE))
    assert x.tolist() == [rank + 1 for rank in range(WORLD_SIZE)]
    if RANK == 0:
        dist.send(mine(), 1)
    elif RANK == 1:
        dist.recv(x := torch.empty(4, device=DEVICE), 0)
        holds(x, 1)
    gathered: list[object] = [None] * WORLD_SIZE
    dist.all_gather_object(gathered, RANK)
    assert gathered == list(range(WORLD_SIZE))
    objects = [RANK]
    dist.broadcast_object_list(objects, 0, device=DEVICE)
    assert objects == [0]
    dist.barrier()
    dist.barrier(device_ids=[DEVICE.index])


def coalesced() -> None:
    with dist._coalescing_manager(device=DEVICE, async_ops=True) as manager:
        tensors = [mine(), mine()]
        for tensor in tensors:
            dist.all_reduce(tensor)
    manager.wait()
    for tensor in tensors:
        holds(tensor, SUM)


def groups() -> None:
    # After the meshes: torch names a mesh's group by how many groups a rank is in, and ranks of gloo must agree on it.
    group = dist.new_group([0, 1])
    if RANK < 2:
        dist.all_reduce(x := mine(), group=group)
        holds(x, 3)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))


def trained(module: nn.Module, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    for step in range(3):
        torch.manual_seed(10 * step + RANK)
        module(torch.randn(4, 8).pin_memory().to(device, non_blocking=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def sharded(module: nn.Sequential, mesh: DeviceMesh, **options: object) -> nn.Sequential:
    for layer in (module[0], module[3]):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(module, mesh=mesh, **options)
    return module


def whole(module: nn.Module) -> list[torch.Tensor]:
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().cpu() for p in module.parameters()]


def same(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(whole(one), whole(other), strict=True):
        assert torch.equal(a, b), (a - b).abs().max()


def training() -> None:
    cpu = torch.device("cpu")
    ddp = nn.parallel.DistributedDataParallel
    same(trained(ddp(model().to(DEVICE)), DEVICE)[0], trained(ddp(model()), cpu)[0])
    shapes = [((WORLD_SIZE,), None)] + ([((2, 2), ("replicate", "shard"))] if WORLD_SIZE == 4 else [])
    for shape, names in shapes:
        here, there = (init_device_mesh(kind, shape, mesh_dim_names=names) for kind in ("sim", "cpu"))
        on_device, optimizer = trained(sharded(model().to(DEVICE), here), DEVICE)
        same(on_device, trained(sharded(model(), there), cpu)[0])
        offloaded = sharded(model().to(DEVICE), here, offload_policy=CPUOffloadPolicy())
        trained(offloaded, DEVICE)
        assert next(offloaded.parameters()).to_local().is_pinned()
        saved(on_device, optimizer)


def saved(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, 0)
    before = copy.deepcopy(whole(module))
    state = {"model": module.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.save(state, checkpoint_id=folder[0])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.to_local().zero_()
    dcp.load(state, checkpoint_id=folder[0])
    for a, b in zip(before, whole(module), strict=True):
        assert torch.equal(a, b)


def tensors() -> None:
    mesh = init_device_mesh("sim", (WORLD_SIZE,))
    value = torch.arange(16.0).view(8, 2)
    split = distribute_tensor(value.to(DEVICE), mesh, [Shard(0)])
    assert torch.equal((split @ split.T).full_tensor().cpu(), value @ value.T)
    assert torch.equal(split.redistribute(placements=[Shard(1)]).full_tensor().cpu(), value)
    assert torch.equal(split.redistribute(placements=[Replicate()]).to_local().cpu(), value)


torch.accelerator.set_device_index(DEVICE.index)
assert dist.get_default_backend_for_device("sim") == "simccl"
dist.init_process_group("cpu:gloo,sim:simccl", device_id=DEVICE)
for check in (reductions, moves, coalesced, training, tensors, groups):
    check()
dist.destroy_process_group()
print("done", RANK)
