"""Saves under one strategy and loads under another, through the public API; run by test_matrix.py.

Every rank gets the same batches, so that all strategies do the same arithmetic: sums of equal gradients are exact. A
cell is exact if the losses of the next steps, the parameters, buffers and optimizer state behind them are those of a
run on the loading strategy that was never interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.cluster import process_group
from nucleate.strategies import FSDPStrategy, Strategy
from tests.multi.device import accelerator, device

NUM_STEPS = 3
FORMATS = ("dcp", "safetensors", "torch")


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 3 * dim + 1)
        self.down = nn.Linear(3 * dim + 1, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Blocks, a tie, a buffer that changes, a frozen parameter, odd sizes, fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.blocks = nn.ModuleList(Block(6) for _ in range(3))
        self.single = nn.Parameter(torch.randn(1, 6))
        self.frozen = nn.Parameter(torch.randn(3, 6), requires_grad=False)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen += 1
        x = self.embed(tokens) + self.single + self.frozen.sum(0)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


#: Name to number of ranks and strategy.
STRATEGIES: dict[str, tuple[int, Callable[[], str | Strategy]]] = {
    "single": (1, lambda: "single_device"),
    "ddp2": (2, lambda: "ddp"),
    "fsdp2": (2, lambda: "fsdp"),
    "fsdp4": (4, lambda: "fsdp"),
    "hsdp": (4, lambda: FSDPStrategy(num_replicas=2)),
}
#: Those that are loaded into, too.
OTHER_POLICIES: dict[str, tuple[int, Callable[[], str | Strategy]]] = {
    "fsdp2-linear": (2, lambda: FSDPStrategy(wrap=(nn.Linear,))),
}


def suffix(format: str) -> str:
    return ".pt" if format == "torch" else ""


def batch(step: int) -> Tensor:
    return torch.randint(13, (4, 5), generator=torch.Generator(device()).manual_seed(step))


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
    found: dict[str, Any] = {name: full(tensor) for name, tensor in model.state_dict().items()}
    for parameter, fields in optimizer.state.items():
        for field, value in fields.items():
            found[f"{names[id(parameter)]}.{field}"] = full(value)
    return found


def full(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()
    return whole


def differing(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    if left.keys() != right.keys():
        return sorted(left.keys() ^ right.keys())
    return [name for name in left if not torch.equal(left[name], right[name])]


def save_all(folder: Path, world_size: int) -> None:
    for name, (ranks, strategy) in STRATEGIES.items():
        if ranks != world_size:
            continue
        runtime = Runtime(accelerator=accelerator(), strategy=strategy())
        model, optimizer, scheduler = build(runtime, seed=1)
        train(runtime, model, optimizer, scheduler, 0, NUM_STEPS)
        for format in FORMATS:
            state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": NUM_STEPS}
            runtime.save(folder / f"{name}-{format}{suffix(format)}", state, format=format)


def load_all(folder: Path, world_size: int) -> None:
    for name, (ranks, strategy) in {**STRATEGIES, **OTHER_POLICIES}.items():
        if ranks != world_size:
            continue
        runtime = Runtime(accelerator=accelerator(), strategy=strategy())
        model, optimizer, scheduler = build(runtime, seed=1)
        train(runtime, model, optimizer, scheduler, 0, NUM_STEPS)
        losses = train(runtime, model, optimizer, scheduler, NUM_STEPS, 2 * NUM_STEPS)
        expected = everything(model, optimizer)
        for number, saved in enumerate(STRATEGIES):
            for format in FORMATS:
                path = folder / f"{saved}-{format}{suffix(format)}"
                # Half of the cells bind the deferred model to the files and read when it is set up.
                lazily = (number + FORMATS.index(format)) % 2 == 0

                def before(
                    model: nn.Module, path: Path = path, runtime: Runtime = runtime, lazily: bool = lazily
                ) -> None:
                    if lazily:
                        runtime.load(path, {"model": model})

                model, optimizer, scheduler = build(runtime, 2, before)
                state: dict[str, Any] = {"optimizer": optimizer, "scheduler": scheduler, "step": 0, "model": model}
                report = runtime.load(path, state)
                again = train(runtime, model, optimizer, scheduler, state["step"], 2 * NUM_STEPS)
                wrong = differing(everything(model, optimizer), expected)
                exact = again == losses and not wrong and state["step"] == NUM_STEPS and report.is_exact
                if runtime.is_global_zero:
                    print(f"cell {saved} {name} {format} {'exact' if exact else f'DIFFERS {again} {losses} {wrong}'}")


if __name__ == "__main__":
    try:
        {"save": save_all, "load": load_all}[sys.argv[1]](Path(sys.argv[2]), int(os.environ.get("WORLD_SIZE", "1")))
    finally:
        process_group.stop()
