"""Constructs models of several sizes in one way, in this process, and reports what each took.

    python -m tests.bench.when nucleate --kind few --dtype fp32 --sizes 1m 4m --state untouched

Imports and what happens once per process come before the clock. Every size is constructed once and stays, so that each
takes memory that the process has not used. Memory is touched and given back just before (`touched`), or the process
idles first, so that a virtual machine's host takes back what is free (`untouched`).
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from tests.bench.construct_ways import Build, nucleate
from tests.bench.measure import Numbers, report
from tests.bench.memory import Peak, available_bytes
from tests.bench.state import TOUCHED, add_state, enter

SIZES = {
    "1m": 10**6,
    "4m": 4 * 10**6,
    "16m": 16 * 10**6,
    "64m": 64 * 10**6,
    "256m": 256 * 10**6,
    "1b": 10**9,
    "2b": 2 * 10**9,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

NUM_FEW = 16
#: Large models have some hundred to two thousand tensors, small ones of many layers narrow ones.
NUM_MANY = 1000
NARROW = 64


def shape(kind: str, size: str) -> tuple[int, int]:
    """Return how many square linear layers a model has, and how wide they are.

    Args:
        kind: `few` has 16, `many` layers of 64 x 64 up to a thousand, and a thousand wider ones beyond.
        size: Which of `SIZES`.
    """
    num_layers = NUM_FEW if kind == "few" else min(NUM_MANY, round(SIZES[size] / (NARROW**2 + NARROW)))
    return num_layers, max(NARROW, 2 * round((SIZES[size] / num_layers) ** 0.5 / 2))


def num_parameters(kind: str, size: str) -> int:
    num_layers, width = shape(kind, size)
    return num_layers * (width**2 + width)


def make_stack(num_layers: int, width: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(num_layers)))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def eager(dtype: torch.dtype) -> Build:
    def build(make: Callable[[], nn.Module]) -> object:
        with default_dtype(dtype):
            return make()

    return build


def cast(dtype: torch.dtype) -> Build:
    return lambda make: make().to(dtype)


WAYS: dict[str, Callable[[torch.dtype], Build]] = {
    "eager": eager,
    "cast": cast,
    "nucleate": nucleate("single_device", True, times_parts=False),
    "unsaid": nucleate("single_device", None, times_parts=False),
}


def measure(build: Build, kind: str, size: str) -> tuple[Numbers, object]:
    """Construct one model, and return what it took and the model."""
    num_layers, width = shape(kind, size)
    made: list[nn.Module] = []

    def make() -> nn.Module:
        made.append(make_stack(num_layers, width))
        return made[-1]

    torch.manual_seed(1)
    gc.collect()
    peak = Peak()
    start = time.perf_counter()
    kept = build(make)
    wall_s = time.perf_counter() - start
    added_bytes = peak.added_bytes()
    numbers = {
        "wall_s": wall_s,
        "peak_bytes": added_bytes,
        "mark": mark(made[0]),
        "stream": str(torch.rand(8).tolist()),
    }
    return numbers, kept


def mark(model: nn.Module) -> str:
    """Return a fingerprint of both ends of every parameter: reading all of them would take longer than to make them."""
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().view(-1)
        ends: Any = torch.cat([flat[:8], flat[-8:]]).view(torch.uint8).numpy()
        total.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        total.update(ends)
    return total.hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--kind", choices=("few", "many"), required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--sizes", choices=SIZES, nargs="+", required=True)
    add_state(parser)
    args = parser.parse_args(argv)
    dtype = DTYPES[args.dtype]
    build = WAYS[args.way](dtype)
    # Small, so that what the allocator learns is what it has learned in a user's process; and recorded all the same.
    with patch("nucleate.materialize.block.ONSET_NUMEL", 1):
        build(lambda: make_stack(2, NARROW))
    # What a model takes while it is constructed: with room for what nucleate and the allocator take besides.
    item_bytes = 4 if args.way == "cast" else dtype.itemsize
    kept: list[object] = []
    found: Numbers = {}
    for size in args.sizes:
        needed_bytes = int(1.1 * num_parameters(args.kind, size) * item_bytes) + 2**25
        if needed_bytes > available_bytes():
            print(f"{size} needs {needed_bytes / 2**30:.1f} GiB, and there are not so many", file=sys.stderr)
            break
        # A cast gives memory back that the next model would find touched.
        if args.state == TOUCHED or not kept or args.way == "cast":
            enter(args.state, needed_bytes, idle_s=args.idle_s)
        found[size], model = measure(build, args.kind, size)
        kept.append(model)
    report(found)


if __name__ == "__main__":
    main()
