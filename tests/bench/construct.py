"""Constructs the model in one way, in this process alone or on the ranks of torchrun, and reports what it took.

    python -m tests.bench.construct nucleate --size 1m --init plain --seed 1

Clock and peak run over construction and set-up of the model. CPU time is of all threads of a process; `part_cpu_s` is
what of it nucleate takes for the values of its own part of the model. Imports, the process group and everything that
happens once per process (shown as `first_use_s`, measured on a model of a thousand parameters) come before, and then
the memory is brought into the state that is measured.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.bench.construct_ways import WAYS, part_cpu_s
from tests.bench.memory import Peak
from tests.bench.model import DTYPES, INITS, SIZES, default_dtype, make_model, num_parameters
from tests.bench.ranks import barrier, report_and_end
from tests.bench.state import add_state, enter


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--init", choices=INITS, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--seed", type=int, required=True)
    add_state(parser)
    args = parser.parse_args(argv)
    dtype = DTYPES[args.dtype]
    made: list[nn.Module] = []

    def make(size: str = args.size) -> nn.Module:
        # Those who have no precision of their own are asked for the dtype as torch asks for it.
        with default_dtype(dtype):
            model = make_model(SIZES[size], args.init)
        made.append(model)
        return model

    build = WAYS[args.way].prepare(dtype)
    # What is imported, looked up or checked only once is not paid per parameter; it has a column of its own.
    start = time.perf_counter()
    build(lambda: make("micro"))
    first_use_s = time.perf_counter() - start

    made.clear()
    torch.manual_seed(args.seed)
    gc.collect()
    ranks = WAYS[args.way].ranks
    # The model and a quarter; DDP takes buckets as large as the model besides. Alike for all that are compared.
    models = 1.25 if ranks == 1 else 4.5 / ranks
    barrier()
    enter(args.state, int(models * dtype.itemsize * num_parameters(SIZES[args.size])), ranks, args.idle_s)
    barrier()
    peak = Peak()
    part_before_s = part_cpu_s()
    start, cpu_start = time.perf_counter(), time.process_time()
    kept = build(make)
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    added_bytes = peak.added_bytes()

    stream = torch.rand(8).tolist()
    mine = {
        "first_use_s": first_use_s,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "part_cpu_s": part_cpu_s() - part_before_s,
        "peak_bytes": added_bytes,
        "weights": digest(made[0]),
        "stream": str(stream),
    }
    del kept
    report_and_end(mine)


def digest(model: nn.Module) -> str:
    """Return a fingerprint of every bit of every parameter and buffer; shards are gathered one tensor at a time."""
    total = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        whole = _whole(tensor)
        total.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
        data: Any = whole.view(-1).view(torch.uint8).numpy()
        total.update(data)
    return total.hexdigest()


@torch.no_grad()
def _whole(tensor: Tensor) -> Tensor:
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered.detach().contiguous()


if __name__ == "__main__":
    main()
