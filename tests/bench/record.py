"""Constructs Llama 70B without its values, and reports how long that takes and how much memory.

    python -m tests.bench.record nucleate

The stream's end is part of it: where `torch.rand` goes on after 141 billion numbers that nobody drew.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from tests.bench.measure import report
from tests.bench.memory import Peak
from tests.bench.model import SIZES, llama_config


def _deferred() -> AbstractContextManager[object]:
    from nucleate.deferred import deferred

    return deferred()


WAYS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "meta": lambda: torch.device("meta"),
    "nucleate": _deferred,
}


def main(argv: Sequence[str] | None = None) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    context = WAYS[parser.parse_args(argv).way]
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    start = time.perf_counter()
    with context():
        LlamaForCausalLM(llama_config(SIZES["micro"]))
    first_use_s = time.perf_counter() - start
    gc.collect()
    peak = Peak()
    start = time.perf_counter()
    with context():
        model = LlamaForCausalLM(config)
    wall_s = time.perf_counter() - start
    assert sum(parameter.numel() for parameter in model.parameters()) > 68e9
    report({"first_use_s": first_use_s, "wall_s": wall_s, "peak_bytes": peak.added_bytes()})


if __name__ == "__main__":
    main()
