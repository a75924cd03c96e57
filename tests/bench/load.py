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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.bench import load_peers as peers
from tests.bench.checkpoint_files import DTYPES, SHAPES, Files, drop, fingerprint, read_all
from tests.bench.construct import over_ranks
from tests.bench.load_peers import Load
from tests.bench.measure import report
from tests.bench.memory import Peak, SampledPeak, available_bytes, prefault


@dataclass(frozen=True)
class Way:
    """One way to come from files to a model.

    Attributes:
        label: What the table calls it.
        prepare: Imports and launches what it needs; that is not measured. Returns what is.
        ranks: On how many processes.
        ours: Its weights must be those of the files.
        torch_file: It reads the `.pt` file, not the shards of safetensors.
        maps: It maps files, so that its anonymous memory has to be sampled.
        frozen: Its weights stay where the files are and are not to be changed.
    """

    label: str
    prepare: Callable[[], Load]
    ranks: int = 1
    ours: bool = False
    torch_file: bool = False
    maps: bool = False
    frozen: bool = False


def nucleate(strategy: str, **options: Any) -> Callable[[], Load]:
    def prepare() -> Load:
        from transformers import LlamaForCausalLM

        from nucleate import Runtime

        runtime: Any = Runtime(accelerator="cpu", strategy=strategy, precision="bf16-true")
        runtime.launch()

        def load(files: Files) -> nn.Module:
            with runtime.init_module(empty_init=True):
                model: Any = LlamaForCausalLM(files.config())
            runtime.load_raw(files.folder, model, **options)
            runtime.setup(model)
            loaded: nn.Module = model
            return loaded

        return load

    return prepare


def nucleate_state_dict(strategy: str) -> Callable[[], Load]:
    def prepare() -> Load:
        from safetensors.torch import load_file
        from transformers import LlamaForCausalLM

        from nucleate import Runtime

        runtime: Any = Runtime(accelerator="cpu", strategy=strategy, precision="bf16-true")
        runtime.launch()

        def load(files: Files) -> nn.Module:
            with runtime.init_module(empty_init=True):
                model: Any = LlamaForCausalLM(files.config())
            state = {name: tensor for shard in files.shards for name, tensor in load_file(shard).items()}
            model.load_state_dict(state)
            del state
            runtime.setup(model)
            loaded: nn.Module = model
            return loaded

        return load

    return prepare


WAYS = {
    "nucleate": Way("nucleate `load_raw`", nucleate("single_device"), ours=True),
    "nucleate-mmap": Way(
        "nucleate `load_raw(mmap=True)`: frozen",
        nucleate("single_device", mmap=True),
        ours=True,
        maps=True,
        frozen=True,
    ),
    "nucleate-state-dict": Way(
        "nucleate, safetensors `load_file`, `load_state_dict` before `setup`",
        nucleate_state_dict("single_device"),
        ours=True,
        maps=True,
    ),
    "transformers": Way("transformers `from_pretrained`", peers.transformers, maps=True),
    "torch-mmap": Way(
        "meta, `torch.load(mmap=True)`, `load_state_dict(assign=True)`",
        peers.torch_load_mmap,
        torch_file=True,
        maps=True,
    ),
    "load-file": Way("meta, safetensors `load_file`, `load_state_dict(assign=True)`", peers.load_file, maps=True),
    "safe-open": Way("meta, `to_empty`, safetensors `safe_open`, `copy_`", peers.safe_open_copy, maps=True),
    "dcp": Way("meta, `to_empty`, DCP `HuggingFaceStorageReader`", peers.dcp, maps=True),
    "runai": Way("meta, runai-model-streamer, `load_state_dict(assign=True)`", peers.runai, maps=True),
    "fastsafetensors": Way("meta, fastsafetensors, `load_state_dict(assign=True)`", peers.fastsafetensors, maps=True),
    "accelerate": Way(
        "Accelerate `init_empty_weights`, `load_checkpoint_and_dispatch`", peers.accelerate_dispatch, maps=True
    ),
    "accelerate-in-model": Way(
        "meta, `to_empty`, Accelerate `load_checkpoint_in_model`", peers.accelerate_in_model, maps=True
    ),
    "fabric": Way("Fabric `init_module(empty_init=True)`, `load_raw`", peers.fabric, torch_file=True, maps=True),
    "torch-load": Way("eager, `torch.load`, `load_state_dict`", peers.torch_load, torch_file=True, maps=True),
    "nucleate-fsdp": Way("nucleate `fsdp`, `load_raw`", nucleate("fsdp"), ranks=2, ours=True),
    "nucleate-state-dict-fsdp": Way(
        "nucleate `fsdp`, `load_file`, `load_state_dict` before `setup`",
        nucleate_state_dict("fsdp"),
        ranks=2,
        ours=True,
        maps=True,
    ),
    "dcp-ranks": Way(
        "meta, `fully_shard`, `to_empty`, DCP `HuggingFaceStorageReader`", peers.dcp_ranks, ranks=2, maps=True
    ),
    "fabric-ranks": Way(
        "Fabric `ModelParallelStrategy`, `load_raw`", peers.fabric_ranks, ranks=2, torch_file=True, maps=True
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--size", choices=SHAPES, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--cold", action="store_true")
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
    read_by = files.read_by(way.torch_file)
    if not dist.is_initialized() or dist.get_rank() == 0:
        (drop if args.cold else read_all)(read_by)
    # Enough for a loader that holds the file and the model; alike for all that are compared.
    final_bytes = files.size_bytes * 2 // DTYPES[args.dtype].itemsize
    most_bytes = (files.size_bytes * 5 // 4 + final_bytes) // way.ranks
    _barrier()
    prefault(min(most_bytes, int(0.8 * available_bytes() / way.ranks)))
    sampled = SampledPeak() if way.maps else None
    _barrier()
    peak = Peak()
    start, cpu_start = time.perf_counter(), time.process_time()
    model = load(files)
    load_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    rss_bytes = peak.added_rss_bytes()
    peak_bytes = peak.added_bytes() if sampled is None else sampled.added_bytes()
    update_s = None
    if not way.frozen:
        start = time.perf_counter()
        change(model)
        update_s = time.perf_counter() - start
        change(model)

    kept_bytes = sum(_local(tensor).nbytes for tensor in (*model.parameters(), *model.buffers()))
    mine = {
        "first_use_s": first_use_s,
        "load_s": load_s,
        "cpu_s": cpu_s,
        "ready_s": None if update_s is None else load_s + update_s,
        "peak_bytes": peak_bytes,
        "rss_bytes": rss_bytes,
        "kept_bytes": kept_bytes,
        "rss_over_kept": rss_bytes / kept_bytes,
        "threads": torch.get_num_threads(),
        "weights": fingerprint((name, _whole(parameter)) for name, parameter in model.named_parameters()),
        "buffers": str(_right_buffers(model, files)),
    }
    every = [mine]
    if dist.is_initialized():
        every = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, mine)
    if not dist.is_initialized() or dist.get_rank() == 0:
        report({key: None if value is None else over_ranks([one[key] for one in every]) for key, value in mine.items()})
    _barrier()
    if dist.is_initialized():
        time.sleep(0.2)
    # Not by the interpreter: gloo's threads now and then abort its exit, and nothing is left to be done.
    os._exit(0)


@torch.no_grad()
def change(model: nn.Module) -> None:
    """Change every element in place; a second time makes it what it was, to the last bit."""
    for parameter in model.parameters():
        _local(parameter).neg_()


def _right_buffers(model: nn.Module, files: Files) -> bool:
    """Return whether the buffers, which are in no file, are what the constructor makes them."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    expected = dict(LlamaRotaryEmbedding(files.config()).named_buffers())
    buffers = dict(model.named_buffers())
    return bool(buffers) and all(
        not buffer.is_meta and torch.equal(_whole(buffer), expected[name.rpartition(".")[2]])
        for name, buffer in buffers.items()
    )


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


@torch.no_grad()
def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
