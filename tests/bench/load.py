"""Loads a checkpoint in one way, in this process alone or on the ranks of torchrun, and reports what it took.

    python -m tests.bench.load nucleate --files FOLDER --size 10m --dtype bf16

The clock runs from "no model" to a model in bf16 that is filled, and once more until every parameter has been changed
in place, as a first step of training does: only then a file that was mapped has become memory. The peaks are those of
loading alone. Imports, the process group and everything that happens once per process (shown as `first_use_s`,
measured on a model of a thousand parameters) come before.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.bench.checkpoint_files import SHAPES, Files, drop, fingerprint, read_all
from tests.bench.held import Held, local_of
from tests.bench.load_ways import WAYS
from tests.bench.memory import Peak, SampledPeak
from tests.bench.model import DTYPES
from tests.bench.ranks import barrier, is_first, report_and_end
from tests.bench.state import add_state, enter


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--size", choices=SHAPES, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--cold", action="store_true")
    add_state(parser)
    args = parser.parse_args(argv)
    # Nothing is to be looked up in the network.
    os.environ["HF_HUB_OFFLINE"] = "1"
    way = WAYS[args.way]
    files = Files(args.files, args.size, args.dtype)
    load = way.prepare()
    # What is imported, looked up or checked only once is not paid per parameter; it has a column of its own.
    start = time.perf_counter()
    load(Files(args.files, "micro", args.dtype))
    first_use_s = time.perf_counter() - start

    gc.collect()
    if is_first():
        (drop if args.cold else read_all)(files.read_by(way.torch_file))
    # Enough for a loader that holds the file and the model; alike for all that are compared.
    final_bytes = files.size_bytes * 2 // DTYPES[args.dtype].itemsize
    barrier()
    enter(args.state, (files.size_bytes * 5 // 4 + final_bytes) // way.ranks, way.ranks, args.idle_s)
    sampled = SampledPeak() if way.maps else None
    barrier()
    peak = Peak()
    start, cpu_start = time.perf_counter(), time.process_time()
    model = load(files)
    load_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    rss_bytes = peak.added_rss_bytes()
    peak_bytes = peak.added_bytes() if sampled is None else sampled.added_bytes()
    # Before the update, which copies what is mapped.
    held = Held.by(model)
    update_s = None
    if not way.frozen:
        start = time.perf_counter()
        change(model)
        update_s = time.perf_counter() - start
        change(model)

    kept_bytes = sum(local_of(tensor).nbytes for tensor in (*model.parameters(), *model.buffers()))
    mine = {
        "first_use_s": first_use_s,
        "load_s": load_s,
        "cpu_s": cpu_s,
        "ready_s": None if update_s is None else load_s + update_s,
        "peak_bytes": peak_bytes,
        "rss_bytes": rss_bytes,
        "kept_bytes": kept_bytes,
        "private_bytes": held.private_bytes,
        "mapped_bytes": held.mapped_bytes,
        "rss_over_kept": rss_bytes / kept_bytes,
        "threads": torch.get_num_threads(),
        "weights": fingerprint((name, _whole(parameter)) for name, parameter in model.named_parameters()),
        "buffers": str(_right_buffers(model, files)),
    }
    report_and_end(mine)


@torch.no_grad()
def change(model: nn.Module) -> None:
    """Change every element in place; a second time makes it what it was, to the last bit."""
    for parameter in model.parameters():
        local_of(parameter).neg_()


def _right_buffers(model: nn.Module, files: Files) -> bool:
    """Return whether the buffers, which are in no file, are what the constructor makes them."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    expected = dict(LlamaRotaryEmbedding(files.config()).named_buffers())
    buffers = dict(model.named_buffers())
    return bool(buffers) and all(
        not buffer.is_meta and torch.equal(_whole(buffer), expected[name.rpartition(".")[2]])
        for name, buffer in buffers.items()
    )


@torch.no_grad()
def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


if __name__ == "__main__":
    main()
