"""Loads a bf16 checkpoint into 8-bit or 4-bit layers in one way, in this process, and reports what it took.

    python -m tests.bench.quantize nucleate int8 --files FOLDER --size 10m

The clock runs from "no model" to a model that is quantized, whose every page has been looked at. The peaks are those of
loading alone. Imports and everything that happens once per process (shown as `first_use_s`, measured on a model of a
thousand parameters) come before, and then the memory is brought into the state that is measured.
"""

from __future__ import annotations

import argparse
import gc
import mmap
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.bench.checkpoint_files import SHAPES, Files, fingerprint, read_all
from tests.bench.load_peers import Load
from tests.bench.measure import report
from tests.bench.memory import Peak, SampledPeak
from tests.bench.state import add_state, enter

MODES = ("int8", "nf4")
#: How the names of what belongs to a quantized weight end, besides its codes; bitsandbytes names them.
_SCALES = ("SCB", "weight_format", "absmax", "quant_map", "nested_absmax", "nested_quant_map")


def nucleate(mode: str) -> Load:
    from transformers import LlamaForCausalLM

    from nucleate import Runtime
    from nucleate_bitsandbytes import BitsandbytesPrecision

    runtime: Any = Runtime(accelerator="cpu", precision=BitsandbytesPrecision(mode))

    def load(files: Files) -> nn.Module:
        with runtime.init_module(empty_init=True):
            model: Any = LlamaForCausalLM(files.config())
        model.requires_grad_(False)
        runtime.load_raw(files.folder, model)
        runtime.setup(model)
        loaded: nn.Module = model
        return loaded

    return load


def transformers(mode: str) -> Load:
    from transformers import BitsAndBytesConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    hide: Any = disable_progress_bar
    hide()
    make_config: Any = BitsAndBytesConfig
    if mode == "int8":
        config = make_config(load_in_8bit=True)
    else:
        config = make_config(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)

    def load(files: Files) -> nn.Module:
        model: nn.Module = LlamaForCausalLM.from_pretrained(
            files.folder, dtype=torch.bfloat16, quantization_config=config, device_map="cpu", local_files_only=True
        )
        return model

    return load


WAYS: dict[str, Callable[[str], Load]] = {"nucleate": nucleate, "transformers": transformers}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--size", choices=SHAPES, required=True)
    add_state(parser)
    args = parser.parse_args(argv)
    # Nothing is to be looked up in the network.
    os.environ["HF_HUB_OFFLINE"] = "1"
    files = Files(args.files, args.size, "bf16")
    load = WAYS[args.way](args.mode)
    # What is imported, looked up or checked only once is not paid per parameter; it has a column of its own.
    start = time.perf_counter()
    load(Files(args.files, "micro", "bf16"))
    first_use_s = time.perf_counter() - start

    gc.collect()
    read_all(files.shards)
    # Enough for a loader that holds the files and the model; alike for all that are compared.
    enter(args.state, files.size_bytes * 2, idle_s=args.idle_s)
    # It maps files, which the kernel's own mark does not tell from memory.
    sampled = SampledPeak() if args.way == "transformers" else None
    peak = Peak()
    start, cpu_start = time.perf_counter(), time.process_time()
    model = load(files)
    look_at(model)
    load_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    rss_bytes = peak.added_rss_bytes()
    peak_bytes = peak.added_bytes() if sampled is None else sampled.added_bytes()
    state = model.state_dict()
    report(
        {
            "first_use_s": first_use_s,
            "load_s": load_s,
            "cpu_s": cpu_s,
            "peak_bytes": peak_bytes,
            "rss_bytes": rss_bytes,
            "kept_bytes": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
            "num_quantized": sum(is_codes(name, tensor) for name, tensor in state.items()),
            **fingerprints(model),
        }
    )


def look_at(model: nn.Module) -> None:
    """Read a byte of every page of the model."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()


def is_codes(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor of a state dict is a quantized weight."""
    return name.endswith(".weight") and not tensor.is_floating_point()


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Return a fingerprint each of the codes, of what they are scaled with, and of all other tensors."""
    parts: dict[str, dict[str, Tensor]] = {"codes": {}, "scales": {}, "rest": dict(model.named_buffers())}
    for name, tensor in model.state_dict().items():
        if is_codes(name, tensor):
            parts["codes"][name] = tensor
        elif name.endswith(_SCALES) or ".quant_state." in name:
            parts["scales"][name] = tensor
        else:
            parts["rest"][name] = tensor
    return {part: fingerprint(tensors.items()) for part, tensors in parts.items()}


if __name__ == "__main__":
    main()
