"""Every layout of shards that torch offers gets eager's values, and a rank makes no more than it owns where it can.

Arguments: the names of layouts to try.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from nucleate.deferred import convert, deferred
from nucleate.deferred.randomness.fills import Fill
from nucleate.materialize import Plan, execute
from tests.deferred.rows import Rows
from tests.multi.device import ACCELERATOR, device, start_group

made = 0
real_make = Fill.make


def counted_make(self: Fill, start: int, out: torch.Tensor, seek: Any) -> None:
    global made
    made += out.numel()
    real_make(self, start, out, seek)


Fill.make = counted_make  # type: ignore[method-assign]


class Net(nn.Module):
    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, height)
        self.down = nn.Linear(height, width)
        self.table = nn.Embedding(height, width, padding_idx=3)
        nn.init.normal_(self.up.weight, 0.1, 0.02)
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        self.down.weight.data.mul_(0.7)
        # Rows of codes are converted where they are kept.
        codes, scales = convert(nn.init.normal_(torch.empty(height, width)), Rows())
        self.codes, self.scales = (nn.Parameter(part, requires_grad=False) for part in (codes, scales))
        # Made whole on each rank, whatever is kept of it.
        self.own = nn.Linear(16, 16)
        nn.init.orthogonal_(self.own.weight)


def rows(model: Net) -> None:
    fully_shard(model, mesh=init_device_mesh(ACCELERATOR, (dist.get_world_size(),)))


def columns(model: Net) -> None:
    def place(parameter: nn.Parameter) -> Shard:
        return Shard(parameter.dim() - 1)

    fully_shard(model, mesh=init_device_mesh(ACCELERATOR, (dist.get_world_size(),)), shard_placement_fn=place)


def tensor_parallel_and_rows(model: Net) -> None:
    mesh = init_device_mesh(ACCELERATOR, (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan, src_data_rank=None)
    fully_shard(model, mesh=mesh["data"])


def uneven_columns(model: Net) -> None:
    distribute(model, lambda parameter: Shard(1) if parameter.dim() == 2 else Replicate())


def every_third_row(model: Net) -> None:
    distribute(model, lambda parameter: _StridedShard(0, split_factor=3))


def distribute(model: Net, place: Callable[[Any], Any]) -> None:
    mesh = init_device_mesh(ACCELERATOR, (dist.get_world_size(),))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            sharded = distribute_tensor(parameter.detach(), mesh, [place(parameter)], src_data_rank=None)
            setattr(module, name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))


#: Name to how a model is laid out, its width and height, and which part of all a rank may make on `n` ranks.
LAYOUTS: dict[str, tuple[Callable[[Net], None], int, int, Callable[[int], float]]] = {
    "rows": (rows, 300, 501, lambda n: 1 / n),
    # The rows of one of its four matrices are short, those of another one are converted whole.
    "long columns": (columns, 32768, 12, lambda n: (2 / n + 2) / 4),
    "short columns": (columns, 304, 500, lambda n: 1.0),
    "tensor parallel and rows": (tensor_parallel_and_rows, 304, 500, lambda n: 1.0),
    "uneven columns": (uneven_columns, 301, 503, lambda n: 1.0),
    # Not one box of the whole.
    "every third row": (every_third_row, 48, 96, lambda n: 1.0),
}


def main() -> None:
    global made
    start_group()
    for name in sys.argv[1:]:
        lay_out, width, height, share = LAYOUTS[name]
        torch.manual_seed(5)
        eager = Net(width, height)
        stream = torch.rand(4)
        torch.manual_seed(5)
        with deferred(device()):
            model = Net(width, height)
        assert torch.equal(torch.rand(4), stream)
        plan = Plan.of(model)
        plan.release()
        lay_out(model)
        made = 0
        execute(plan, model, device())
        expected = dict(eager.named_parameters())
        numel = sum(parameter.numel() for parameter in expected.values())
        # Rounded up to rows, and groups of 16 at the ends.
        allowed = share(dist.get_world_size()) * numel + 2 * width + 1000
        assert made <= allowed, f"{name}: {made} elements made, {numel} in all"
        for key, parameter in model.named_parameters():
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            assert torch.equal(whole, expected[key]), f"{name}: {key} differs"
        print(f"rank {dist.get_rank()}: {name} exact, made {made} of {numel}", flush=True)
    dist.barrier()
    # As `nucleate.cluster.process_group` ends: gloo's threads may abort an exit that comes right after a collective.
    time.sleep(0.2)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
