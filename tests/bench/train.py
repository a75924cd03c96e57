"""Trains two equal models in one process, block by block in turn: a raw loop, and the same loop with wrappers.

    python -m tests.bench.train nucleate --size micro --pairs 4 --steps 10

What the wrappers add to a step is much less than what two processes differ by; so both loops run in the same
process, and each block is compared with its neighbour.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.bench.measure import report
from tests.bench.model import SIZES, Decoder, Size

NUM_BATCHES = 100

#: Does one step on the next batch and returns its loss.
Step = Callable[[], Tensor]


def raw(size: Size) -> Step:
    model, optimizer, loader = make(size)
    batches = repeat(loader)

    def step() -> Tensor:
        inputs, targets = next(batches)
        loss = loss_of(model, inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def nucleate(size: Size) -> Step:
    from nucleate import Runtime

    runtime = Runtime(accelerator="cpu", strategy="single_device")
    model, optimizer, loader = make(size)
    model, optimizer = runtime.setup(model, optimizer)
    batches = repeat(runtime.setup_dataloaders(loader))

    def step() -> Tensor:
        inputs, targets = next(batches)
        loss = loss_of(model, inputs, targets)
        runtime.backward(loss)
        runtime.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def fabric(size: Size) -> Step:
    from lightning.fabric import Fabric

    instance = Fabric(accelerator="cpu", devices=1)
    instance.launch()
    plain, plain_optimizer, loader = make(size)
    wrapped: Any = instance.setup(plain, plain_optimizer)
    model, optimizer = wrapped
    batches = repeat(instance.setup_dataloaders(loader))

    def step() -> Tensor:
        inputs, targets = next(batches)
        loss = loss_of(model, inputs, targets)
        instance.backward(loss)
        instance.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


LOOPS = {"raw": raw, "nucleate": nucleate, "fabric": fabric}


def make(size: Size) -> tuple[Any, Any, DataLoader[Any]]:
    """Return a model, its optimizer and its data: the same each time."""
    torch.manual_seed(1)
    model = Decoder(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.randint(size.vocab_size, (NUM_BATCHES * size.batch_size, size.context + 1))
    dataset = TensorDataset(text[:, :-1], text[:, 1:])
    # Not shuffled: wrappers shuffle otherwise, and then the losses could not be compared.
    return model, optimizer, DataLoader(dataset, size.batch_size)


def repeat(batches: Any) -> Iterator[Any]:
    while True:
        yield from batches


def loss_of(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("loop", choices=LOOPS)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    args = parser.parse_args(argv)
    size = SIZES[args.size]
    first, second = raw(size), LOOPS[args.loop](size)
    seconds: dict[Step, list[float]] = {first: [], second: []}
    losses: dict[Step, list[float]] = {first: [], second: []}
    gc.collect()
    gc.freeze()
    for pair in range(args.pairs + 1):
        # Either goes first as often: the first of two finds the caches as the other left them.
        for step in (first, second) if pair % 2 else (second, first):
            start = time.perf_counter()
            for _ in range(args.steps):
                loss = step()
            seconds[step].append((time.perf_counter() - start) / args.steps)
            losses[step].append(loss.item())
    # The first pair warms up.
    pairs = list(zip(seconds[first][1:], seconds[second][1:], strict=True))
    report(
        {
            "raw_s": statistics.median(raw_s for raw_s, _ in pairs),
            "added_s": statistics.median(other_s - raw_s for raw_s, other_s in pairs),
            "same_losses": losses[first] == losses[second],
        }
    )


if __name__ == "__main__":
    main()
