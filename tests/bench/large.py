"""Loads the large checkpoint from the disk in one way, in this process or on the ranks of torchrun, and reports it.

    python -m tests.bench.large nucleate --files FOLDER --size 7b

No file is in memory when the clock starts. It runs from "no model" to a model that is filled, or to the second token
that a model says whose weights stay in the files. Imports and everything that happens once per process (shown as
`first_use_s`, measured on a tiny model) come before, and then the memory is brought into the state that is measured.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tests.bench import load_peers as peers
from tests.bench import quantize
from tests.bench.checkpoint_files import SHAPES, drop
from tests.bench.held import Held
from tests.bench.large_files import large_files, sampled_fingerprint
from tests.bench.load_peers import Load
from tests.bench.load_ways import nucleate
from tests.bench.memory import Peak, SampledPeak, cached_bytes
from tests.bench.ranks import barrier, is_first, report_and_end
from tests.bench.state import add_state, enter

#: Some tokens that every model knows.
_PROMPT = tuple(range(1, 9))


@dataclass(frozen=True)
class Way:
    """One way to come from files to a model.

    Attributes:
        label: The name in the table.
        prepare: Imports and launches what the way needs, outside the clock. Returns what the clock measures.
        ranks: The number of processes.
        kept: The form of the weights: bf16, or what `quantize.MODES` names.
        tokens: The clock runs on until the second token.
        maps: The way maps files, so that its anonymous memory has to be sampled.
        ours: A failure or a wrong weight is a fault of nucleate's.
    """

    label: str
    prepare: Callable[[], Load]
    ranks: int = 1
    kept: str = "bf16"
    tokens: bool = False
    maps: bool = False
    ours: bool = False


WAYS = {
    "nucleate": Way("nucleate `load_raw`", nucleate("single_device"), ours=True),
    "nucleate-int8": Way(
        "nucleate `load_raw`, `BitsandbytesPrecision`: int8", lambda: quantize.nucleate("int8"), kept="int8", ours=True
    ),
    "nucleate-nf4": Way(
        "nucleate `load_raw`, `BitsandbytesPrecision`: nf4", lambda: quantize.nucleate("nf4"), kept="nf4", ours=True
    ),
    "nucleate-mmap": Way(
        "nucleate `load_raw(mmap=True)`, to the second token",
        nucleate("single_device", mmap=True),
        tokens=True,
        maps=True,
        ours=True,
    ),
    "transformers": Way(
        "transformers `from_pretrained`, to the second token", peers.transformers, tokens=True, maps=True
    ),
    "nucleate-fsdp": Way("nucleate `fsdp`, `load_raw`", nucleate("fsdp"), ranks=2, ours=True),
    "dcp-ranks": Way(
        "meta, `fully_shard`, `to_empty`, DCP `HuggingFaceStorageReader`", peers.dcp_ranks, ranks=2, maps=True
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--size", choices=SHAPES, required=True)
    add_state(parser)
    args = parser.parse_args(argv)
    # Nothing is to be looked up in the network.
    os.environ["HF_HUB_OFFLINE"] = "1"
    way = WAYS[args.way]
    load = way.prepare()
    start = time.perf_counter()
    first = load(large_files(args.files, "micro"))
    if way.tokens:
        second_token(first)
    del first
    first_use_s = time.perf_counter() - start

    files = large_files(args.files, args.size)
    gc.collect()
    if is_first():
        drop(files.shards)
    barrier()
    enter(args.state, files.size_bytes * 5 // 4 // way.ranks, way.ranks, args.idle_s)
    sampled = SampledPeak() if way.maps else None
    barrier()
    peak, cached = Peak(), cached_bytes()
    start, cpu_start = time.perf_counter(), time.process_time()
    model = load(files)
    load_s = time.perf_counter() - start
    tokens = second_token(model) if way.tokens else []
    all_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    peak_bytes = peak.added_bytes() if sampled is None else sampled.added_bytes()
    grown_bytes = max(0, cached_bytes() - cached)
    held = Held.by(model)
    quantized = way.kept != "bf16"
    mine = {
        "first_use_s": first_use_s,
        "load_s": load_s,
        "all_s": all_s,
        "cpu_s": cpu_s,
        "peak_bytes": peak_bytes,
        "cached_bytes": grown_bytes,
        "private_bytes": held.private_bytes,
        "mapped_bytes": held.mapped_bytes,
        "tokens": str(tokens),
        "num_quantized": sum(quantize.is_codes(*item) for item in model.state_dict().items()) if quantized else 0,
        "weights": "" if quantized else sampled_fingerprint(model),
    }
    report_and_end(mine)


@torch.inference_mode()
def second_token(model: nn.Module) -> list[int]:
    """Return the two tokens that a model says after the prompt, each the likeliest."""
    model.eval()
    ids, cache = torch.tensor([_PROMPT]), None
    tokens = []
    for _ in range(2):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        tokens.append(int(ids))
    return tokens


if __name__ == "__main__":
    main()
