"""Saves under one strategy and loads under another, through the public API; run by test_matrix.py.

Every rank gets the same batches, so that all strategies but those with tensor parallelism do the same arithmetic: sums
of equal gradients are exact. A cell is exact if the loaded parameters, buffers and optimizer state are bit for bit
those that were saved, and the losses of the next steps and the state behind them are those of a run that was never
interrupted. With tensor parallelism, sums have another order, so what comes behind the load is only close.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.cluster import process_group
from nucleate.dimensions import FullyShard, TensorParallel
from nucleate.layout import is_sharded
from nucleate.layout.second_look import indices_of
from nucleate.strategies import FSDPStrategy, Parallel, Strategy
from tests.multi.device import accelerator, device

NUM_STEPS = 3
NUM_LATER_STEPS = 2
FORMATS = ("dcp", "safetensors", ".pt", ".safetensors")


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 3 * dim + 1)
        self.down = nn.Linear(3 * dim + 1, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(q * k.tanh() + v)
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    """Blocks, a tie, a buffer that changes, frozen parameters, a fused weight, odd sizes, fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(14, 6)
        self.blocks = nn.ModuleList(Block(6) for _ in range(3))
        self.single = nn.Parameter(torch.randn(1, 6))
        self.frozen = nn.Parameter(torch.randn(3, 6), requires_grad=False)
        self.head = nn.Linear(6, 14, bias=False)
        self.head.weight = self.embed.weight
        self.blocks[1].qkv.bias.requires_grad_(False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen += 1
        x = self.embed(tokens) + self.single + self.frozen.sum(0)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


PLAN = {
    "embed": "rowwise",
    "head": "colwise_gathered",
    "blocks.*.qkv": "fused_3",
    "blocks.*.out": "rowwise",
}


#: Name to number of ranks and strategy.
STRATEGIES: dict[str, tuple[int, Callable[[], str | Strategy]]] = {
    "single": (1, lambda: "single_device"),
    "ddp2": (2, lambda: "ddp"),
    "fsdp2": (2, lambda: "fsdp"),
    "fsdp4": (4, lambda: "fsdp"),
    "hsdp": (4, lambda: FSDPStrategy(num_replicas=2)),
    "tp2": (2, lambda: Parallel(mesh={"tp": 2}, dimensions=[TensorParallel(PLAN)])),
    "2d": (4, lambda: Parallel(mesh={"dp_shard": 2, "tp": 2}, dimensions=[FullyShard(), TensorParallel(PLAN)])),
}
#: Those that are loaded into, too.
OTHER_POLICIES: dict[str, tuple[int, Callable[[], str | Strategy]]] = {
    "fsdp2-linear": (2, lambda: FSDPStrategy(wrap=(nn.Linear,))),
}
SPLIT_SUMS = ("tp2", "2d")


def cells(long: bool) -> list[tuple[str, str, str]]:
    """Return the cells to try: saving strategy, loading strategy and format."""
    loading = [*STRATEGIES, *OTHER_POLICIES]
    if long:
        return [(left, right, format) for left in STRATEGIES for right in loading for format in FORMATS]
    # Each strategy against one process, both ways; each of them meets two formats, and each format several strategies.
    to = [("single", right, FORMATS[number % 4]) for number, right in enumerate(loading)]
    back = [(left, "single", FORMATS[(number + 2) % 4]) for number, left in enumerate(STRATEGIES) if left != "single"]
    # Layouts that differ most.
    return [*to, *back, ("2d", "tp2", ".pt"), ("hsdp", "2d", "safetensors")]


def path_of(folder: Path, name: str, format: str) -> Path:
    return folder / (f"{name}{format}" if format.startswith(".") else f"{name}-{format}")


def batch(step: int) -> Tensor:
    return torch.randint(14, (4, 5), generator=torch.Generator(device()).manual_seed(step))


def build(runtime: Runtime, seed: int, before: Callable[[nn.Module], object] = lambda model: None) -> tuple[Any, ...]:
    torch.manual_seed(seed)
    with runtime.init_module(empty_init=True):
        model = Model()
    before(model)
    wrapped = runtime.setup(model)
    optimizer = runtime.setup_optimizers(torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], 0.01))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    return wrapped, optimizer, scheduler


def train(runtime: Runtime, model: Any, optimizer: Any, scheduler: Any, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        tokens = batch(step)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        runtime.backward(loss)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def everything(model: Any, optimizer: Any) -> dict[str, Any]:
    """Return all that a run consists of, whole."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, Any] = dict(model.state_dict())
    for parameter, fields in optimizer.state.items():
        for field, value in fields.items():
            found[f"{names[id(parameter)]}.{field}"] = value
    return whole(found)


def whole(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Return tensors whole, put together by the indices that each rank holds.

    torch's `full_tensor` is wrong for FSDP2 over a fused weight.
    """
    mine = {
        name: (indices_of(tensor), tensor.to_local().detach().cpu())
        for name, tensor in tensors.items()
        if is_sharded(tensor)
    }
    everyone: list[Any] = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    found = {}
    for name, tensor in tensors.items():
        if name not in mine:
            found[name] = tensor.detach().cpu().clone()
            continue
        found[name] = torch.full(tensor.shape, torch.nan, dtype=tensor.dtype, device="cpu")
        for parts in everyone:
            indices, local = parts[name]
            if local.numel():
                found[name][torch.meshgrid(*indices, indexing="ij")] = local
    return found


def differing(left: dict[str, Any], right: dict[str, Any], is_close: bool = False) -> list[str]:
    if left.keys() != right.keys():
        return sorted(left.keys() ^ right.keys())

    def alike(mine: Tensor, other: Tensor) -> bool:
        if is_close and mine.is_floating_point():
            return torch.allclose(mine, other, rtol=1e-3, atol=1e-4)
        return torch.equal(mine, other)

    return [name for name in left if not alike(left[name], right[name])]


def save_all(folder: Path, world_size: int, long: bool) -> None:
    for name, (ranks, strategy) in STRATEGIES.items():
        if ranks != world_size:
            continue
        runtime = Runtime(accelerator=accelerator(), strategy=strategy())
        model, optimizer, scheduler = build(runtime, seed=1)
        train(runtime, model, optimizer, scheduler, 0, NUM_STEPS)
        saved = everything(model, optimizer)
        for format in dict.fromkeys(format for left, _, format in cells(long) if left == name):
            state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": NUM_STEPS}
            path = path_of(folder, name, format)
            runtime.save(path, state, **({} if format.startswith(".") else {"format": format}))
        losses = train(runtime, model, optimizer, scheduler, NUM_STEPS, NUM_STEPS + NUM_LATER_STEPS)
        later = everything(model, optimizer)
        if runtime.is_global_zero:
            torch.save((saved, losses, later), folder / f"{name}.expected")


def load_all(folder: Path, world_size: int, long: bool) -> None:
    for name, (ranks, strategy) in {**STRATEGIES, **OTHER_POLICIES}.items():
        if ranks != world_size:
            continue
        runtime = Runtime(accelerator=accelerator(), strategy=strategy())
        for number, (left, right, format) in enumerate(cells(long)):
            if right != name:
                continue
            path = path_of(folder, left, format)
            saved, losses, later = torch.load(folder / f"{left}.expected")

            # Half of the cells bind the deferred model to the files and read when it is set up.
            def before(model: nn.Module, number: int = number, runtime: Runtime = runtime, path: Path = path) -> None:
                if number % 2:
                    runtime.load(path, {"model": model})

            model, optimizer, scheduler = build(runtime, 2, before)
            state: dict[str, Any] = {"optimizer": optimizer, "scheduler": scheduler, "step": 0, "model": model}
            report = runtime.load(path, state)
            wrong = differing(everything(model, optimizer), saved)
            exact = not wrong and state["step"] == NUM_STEPS and report.is_exact
            again = train(runtime, model, optimizer, scheduler, NUM_STEPS, NUM_STEPS + NUM_LATER_STEPS)
            splits = (left in SPLIT_SUMS) != (name in SPLIT_SUMS)
            wrong += [f"later {name}" for name in differing(everything(model, optimizer), later, is_close=splits)]
            exact = exact and not wrong
            exact = exact and (torch.allclose(torch.tensor(again), torch.tensor(losses)) if splits else again == losses)
            if runtime.is_global_zero:
                said = "exact" if exact else f"DIFFERS {again} {losses} {wrong}"
                sys.stdout.write(f"cell {left} {name} {format} {said}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    try:
        action = {"save": save_all, "load": load_all}[sys.argv[1]]
        action(Path(sys.argv[2]), int(os.environ.get("WORLD_SIZE", "1")), "long" in sys.argv[3:])
    finally:
        process_group.stop()
