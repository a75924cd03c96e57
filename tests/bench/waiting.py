"""The cost of watching over ranks: CPU time of barriers and of backwards on two ranks, beside another commit.

`python -m tests.bench.waiting ../other-tree --rounds 15` runs both trees in turn. `--worker` is the program of a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
CALLS = ("barrier", "backward")


def work(num_calls: int) -> None:
    """Make the calls on this rank, and print the CPU time of one call of each kind in microseconds."""
    import torch
    from torch import nn

    from nucleate import Runtime

    runtime = Runtime(accelerator="cpu", strategy="ddp")
    with runtime.init_module():
        model = nn.Linear(8, 8)
    model = runtime.setup(model)
    batch = torch.ones(2, 8)

    def backward() -> None:
        runtime.backward(model(batch).sum())

    taken = {}
    for name, call in {"barrier": runtime.barrier, "backward": backward}.items():
        for _ in range(50):
            call()
        start = time.process_time()
        for _ in range(num_calls):
            call()
        taken[name] = (time.process_time() - start) / num_calls * 1e6
    # One write: two ranks would mix the words of `print`.
    sys.stdout.write(f"CALLS {json.dumps(taken)}\n")


def measure(tree: Path, num_calls: int) -> dict[str, float]:
    """Run two ranks on the sources of a tree, and return the mean CPU time of both for one call of each kind."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, *torchrun, str(Path(__file__)), "--worker", str(num_calls)]
    variables = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=600)
    ranks = [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("CALLS ")]
    return {name: statistics.mean(rank[name] for rank in ranks) for name in CALLS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", nargs="?", type=Path, help="the root of the tree of the other commit")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker)
        return
    ratios: dict[str, list[float]] = {name: [] for name in CALLS}
    for number in range(options.rounds):
        trees = {"here": ROOT, "other": options.other.resolve()}
        order = list(trees) if number % 2 else list(reversed(trees))
        taken = {name: measure(trees[name], options.calls) for name in order}
        for name in CALLS:
            ratios[name].append(taken["here"][name] / taken["other"][name])
        print(number + 1, {tree: {name: round(us, 1) for name, us in one.items()} for tree, one in taken.items()})
    draw = random.Random(0)
    for name, all_of in ratios.items():
        medians = sorted(statistics.median(draw.choices(all_of, k=len(all_of))) for _ in range(2000))
        print(
            f"{name}: {statistics.median(all_of):.3f} [{medians[50]:.3f}, {medians[1949]:.3f}] of the other's CPU time"
        )


if __name__ == "__main__":
    main()
