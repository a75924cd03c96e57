"""Compares the layout's arithmetic with what DTensors and FSDP2 hold. The argument names the check."""

import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from nucleate import Runtime
from nucleate.errors import UsageError, VerificationError
from nucleate.layout import Layout, layout_of, placements, reading, second_look, whole_of
from nucleate.layout.boxes import Box
from nucleate.strategies import DDPStrategy, FSDPStrategy, Strategy
from tests.multi.device import ACCELERATOR, device, start_group

SHAPES = [(12, 6), (7, 5), (1, 4), (3, 1), (13, 2), (0, 3)]


def places(world_size: int) -> Iterator[tuple[DeviceMesh, list[Any]]]:
    """Yield meshes of all kinds with the placements that torch can make on them."""
    row = init_device_mesh(ACCELERATOR, (world_size,), mesh_dim_names=("dp_shard",))
    for placement in (Replicate(), Shard(0), Shard(1), _StridedShard(0, split_factor=3)):
        yield row, [placement]
    if world_size == 4:
        square = init_device_mesh(ACCELERATOR, (2, 2), mesh_dim_names=("dp", "tp"))
        for pair in itertools.product((Replicate(), Shard(0), Shard(1)), repeat=2):
            yield square, list(pair)
        yield square["tp"], [Shard(0)]
        yield square["dp"], [Shard(1)]
        # The ranks in another order.
        yield DeviceMesh(ACCELERATOR, torch.tensor([[3, 1], [0, 2]]), mesh_dim_names=("dp", "tp")), [Shard(0), Shard(0)]


def sharded_by_fsdp(world_size: int, whole: Tensor) -> Iterator[DTensor]:
    """Yield parameters that `fully_shard` has sharded: alone, with replicas, and over tensor parallelism."""

    def shard(parameter: Tensor, mesh: DeviceMesh) -> DTensor:
        module = nn.Module()
        module.register_parameter("weight", nn.Parameter(parameter))
        fully_shard(module, mesh=mesh)
        return module.weight  # type: ignore[return-value]

    yield shard(whole.clone(), init_device_mesh(ACCELERATOR, (world_size,)))
    if world_size == 4:
        mesh = init_device_mesh(ACCELERATOR, (2, 2), mesh_dim_names=("dp", "tp"))
        yield shard(whole.clone(), mesh)
        for inner in (Replicate(), Shard(0), Shard(1), _StridedShard(0, split_factor=3)):
            yield shard(distribute_tensor(whole, mesh["tp"], [inner], src_data_rank=None), mesh["dp"])


def compare(tensor: DTensor, whole: Tensor, world_size: int) -> None:
    """Compare the boxes that the layout gives every rank with what every rank holds."""
    entry = layout_of(tensor, world_size)
    layout = Layout({"w": entry}, world_size)
    held: list[Any] = [None] * world_size
    dist.all_gather_object(held, tensor.to_local().detach().cpu())
    said = f"{tensor.placements} of {tuple(whole.shape)}"
    written = torch.zeros(whole.shape, dtype=torch.int64)
    for rank, local in enumerate(held):
        # torch gives an empty part other lengths in the dims that it need not split.
        expected = entry.local_shape(rank) if local.numel() else tuple(local.shape)
        assert tuple(local.shape) == expected, f"{said}: rank {rank} holds {tuple(local.shape)}"
        boxes = layout.boxes("w", rank)
        assert sum(box.numel for box in boxes) == local.numel(), said
        for box in boxes:
            assert torch.equal(box.of_local(local), box.of_whole(whole)), f"{said}: rank {rank} at {box}"
            holders = layout.holders("w", box)
            assert rank in holders, said
            same = [other for other in range(world_size) if box.begin in {b.begin for b in layout.boxes("w", other)}]
            assert list(holders) == same, f"{said}: {holders} {same}"
            if layout.writer("w", box) == rank:
                box.of_whole(written).add_(1)
    assert (written == 1).all(), f"{said}: each element is written once"
    mine = tensor.to_local()
    if not mine.numel():
        assert not reading.cut(tensor, whole.to(mine.device)).numel(), said
        assert not all(map(len, second_look.indices_of(tensor))), said
        return
    assert torch.equal(reading.cut(tensor, whole.to(mine.device)), mine), said
    # The second way comes to the same.
    for dim, indices in enumerate(second_look.indices_of(tensor)):
        assert len(indices) == mine.shape[dim], said
        whole = whole.index_select(dim, indices)
    assert torch.equal(whole, mine.cpu()), said


def held(world_size: int) -> None:
    for shape in SHAPES:
        numel = torch.Size(shape).numel()
        whole = torch.arange(float(numel)).view(shape)
        on_device = whole.to(device())
        for mesh, found in places(world_size):
            compare(distribute_tensor(on_device, mesh, found, src_data_rank=None), whole, world_size)
        for tensor in sharded_by_fsdp(world_size, on_device):
            compare(tensor, whole, world_size)
    print(f"rank {dist.get_rank()}: held as said", flush=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 5)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.up.bias.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("table", torch.arange(3.0))


def built(strategy: Strategy, verify: bool = False) -> tuple[Runtime, Any]:
    runtime = Runtime(accelerator=ACCELERATOR, strategy=strategy, verify=verify)
    torch.manual_seed(3)
    with runtime.init_module(empty_init=True):
        model = Net()
    return runtime, runtime.setup(model)


def shown(world_size: int) -> None:
    strategies: list[Strategy] = [DDPStrategy(), FSDPStrategy()]
    if world_size == 4:
        strategies.append(FSDPStrategy(num_replicas=2))
    for strategy in strategies:
        runtime, model = built(strategy)
        layout = runtime.layout(model)
        assert list(layout) == [*dict(model.named_parameters(remove_duplicate=False)), "table"]
        assert layout["embed.weight"].tied_with == ("head.weight",)
        assert layout.trained == ("scale", "embed.weight", "up.weight", "head.weight")
        assert layout["table"].is_buffer
        rank = runtime.global_rank
        for name, parameter in model.named_parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            assert layout[name].local_shape(rank) == tuple(local.shape), name
        total = sum(t.numel() * 4 for t in (*model.parameters(), *model.buffers()))
        sharded = strategy.name == "fsdp"
        assert (layout.local_bytes(rank) < total) is sharded
        assert ("dp_shard: shard dim 0" in str(layout)) is sharded
    print(f"rank {dist.get_rank()}: shown", flush=True)


def faults(world_size: int) -> None:
    right = placements.boxes_at.__wrapped__

    def moved(shape: Any, sizes: Any, found: Any, coordinate: Any) -> tuple[Box, ...]:
        """Give each rank the part of the next one, where the parts are equally large."""
        return right(shape, sizes, found, tuple((p + 1) % size for p, size in zip(coordinate, sizes, strict=True)))  # type: ignore[no-any-return]

    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 8)

    def is_refused() -> bool:
        runtime = Runtime(accelerator=ACCELERATOR, strategy="fsdp", verify=True)
        with runtime.init_module(empty_init=True):
            model = Even()
        try:
            runtime.setup(model)
        except VerificationError as error:
            return "up.weight" in str(error) or "up.bias" in str(error)
        return False

    rank = dist.get_rank()
    assert not is_refused()
    print(f"rank {rank}: both right", flush=True)
    reading.boxes_at = moved  # type: ignore[assignment]
    assert is_refused()
    print(f"rank {rank}: placing was wrong", flush=True)
    reading.boxes_at = placements.boxes_at
    indices_of = second_look.indices_of
    from nucleate.materialize import verification

    verification.indices_of = lambda tensor: [indices.flip(0) for indices in indices_of(tensor)]  # type: ignore[attr-defined]
    assert is_refused()
    print(f"rank {rank}: verifying was wrong", flush=True)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x)) * self.scale
        return out


def whole(parameter: Any) -> Tensor:
    full: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach()


#: What trains in each step.
TRAINED = [("head",), ("body", "head", "scale"), ("body", "scale"), (), ("scale", "head"), ("body", "head", "scale")]


def train(model: Any, module: Scaled, optimizer: Any, batch: Tensor, backward: Any) -> None:
    for trained in TRAINED:
        for part in ("body", "head", "scale"):
            getattr(module, part).requires_grad_(part in trained)
        optimizer.zero_grad()
        if trained:
            backward(model(batch).square().mean())
            optimizer.step()
        else:
            model(batch)


def changes(world_size: int) -> None:
    batch = torch.randn(4 * world_size, 4, generator=torch.Generator().manual_seed(1)).to(device())
    for strategy in ("ddp", "fsdp"):
        torch.manual_seed(0)
        plain = Scaled()
        train(plain, plain, torch.optim.SGD(plain.parameters(), lr=0.1), batch, Tensor.backward)
        runtime = Runtime(accelerator=ACCELERATOR, strategy=strategy)
        torch.manual_seed(0)
        with runtime.init_module(empty_init=True):
            module = Scaled()
        # As many setups end: nothing trains yet but the head.
        module.body.requires_grad_(False)
        module.scale.requires_grad_(False)
        model = runtime.setup(module)
        optimizer = runtime.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
        share = batch[runtime.global_rank :: world_size]
        train(model, module, optimizer, share, runtime.backward)
        for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(whole(parameter), expected.detach(), msg=f"{strategy}: {name}")
            every = runtime.all_gather(whole(parameter))
            assert torch.equal(every[0], every[-1]), f"{strategy}: {name} differs between ranks"
        module.add_module("adapter", nn.Linear(4, 1))
        words = "adapter.weight, adapter.bias came into the model after `setup`"
        late = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(UsageError, match=words):
            runtime.setup_optimizers(late)
        with pytest.raises(UsageError, match=words):
            model(share)
    print(f"rank {dist.get_rank()}: followed", flush=True)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(5, 24)
        self.out = nn.Linear(8, 5)


class FusedStrategy(Strategy):
    """Splits each of the three parts of `qkv` over `tp`, and all tensors over `dp` by FSDP2."""

    name = "fused"
    distributed = True
    shards = True

    def module_init_context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def lay_out(self, model: Any) -> None:
        mesh = init_device_mesh(ACCELERATOR, (2, 2), mesh_dim_names=("dp", "tp"))
        for name, parameter in list(model.qkv.named_parameters()):
            part = distribute_tensor(
                parameter.detach(), mesh["tp"], [_StridedShard(0, split_factor=3)], src_data_rank=None
            )
            setattr(model.qkv, name, nn.Parameter(part))
        fully_shard(model, mesh=mesh["dp"])


def fused(world_size: int) -> None:
    """FSDP2 over a fused weight: the values, the boxes that are saved, and the values that are loaded."""
    folder = Path(sys.argv[2])
    torch.manual_seed(7)
    eager = Fused()
    runtime = Runtime(accelerator=ACCELERATOR, strategy=FusedStrategy(), verify="all")
    torch.manual_seed(7)
    with runtime.init_module(empty_init=True):
        model = Fused()
    wrapped = runtime.setup(model)
    assert len(runtime.layout(wrapped).boxes("qkv.weight", 0)) == 2

    def assert_equal() -> None:
        # FSDP2 gathers its own way; what it gives back is a fused tensor-parallel parameter again.
        model.unshard()  # type: ignore[operator]
        for name, parameter in eager.named_parameters():
            assert torch.equal(whole(model.get_parameter(name)).cpu(), parameter.detach().cpu()), name
        model.reshard()  # type: ignore[operator]

    for name, parameter in eager.named_parameters():
        assert torch.equal(whole_of(model.get_parameter(name)).cpu(), parameter.detach().cpu()), name
    assert_equal()
    for path in (folder / "one.safetensors", folder / "dcp"):
        runtime.save(path, {"model": wrapped})
        loaded = runtime.load(path)["model"]
        for name, parameter in eager.named_parameters():
            assert torch.equal(loaded[name], parameter.detach().cpu()), f"{path.name}: {name}"
        with torch.no_grad():
            for parameter in wrapped.parameters():
                parameter.to_local().zero_()  # type: ignore[operator]
        runtime.load(path, {"model": wrapped})
        assert_equal()
    print(f"rank {dist.get_rank()}: fused", flush=True)


def main() -> None:
    start_group()
    world_size = dist.get_world_size()
    {"held": held, "runtime": shown, "faults": faults, "changes": changes, "fused": fused}[sys.argv[1]](world_size)
    dist.barrier()
    # As `nucleate.cluster.process_group` ends: gloo's threads may abort an exit that comes right after a collective.
    time.sleep(0.2)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
