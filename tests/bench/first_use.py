"""Imports what a first Llama needs, constructs it in one way, and again, and reports what each took.

    python -m tests.bench.first_use nucleate --size 10m

Nothing but the standard library is imported before the clock starts. With `--bytecode FOLDER` compiled modules are
kept there, as an installation keeps them, whatever the environment says.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

WAYS = ("eager", "meta", "nucleate")
SEED = 1

Build = Callable[[], Any]


class Clock:
    """Measures what happens one after the other, in seconds of the wall and of all threads."""

    def __init__(self) -> None:
        self.numbers: dict[str, Any] = {}
        self.start()

    def start(self) -> None:
        """Begin to measure."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self, name: str) -> None:
        """Note what has passed since the start."""
        self.numbers[f"{name}_s"] = time.perf_counter() - self._wall
        self.numbers[f"{name}_cpu_s"] = time.process_time() - self._cpu


def prepared(way: str) -> Callable[[Any], Build]:
    """Import all that a way needs, and return what makes its builder of a configuration."""
    import torch
    from transformers import LlamaForCausalLM

    if way == "nucleate":
        from nucleate import Runtime

        runtime = Runtime(accelerator="cpu", strategy="single_device")

    def eager(config: Any) -> Any:
        return LlamaForCausalLM(config)

    def meta(config: Any) -> Any:
        with torch.device("meta"):
            return LlamaForCausalLM(config)

    def nucleate(config: Any) -> Any:
        with runtime.init_module(empty_init=True):
            model = LlamaForCausalLM(config)
        return runtime.setup(model)

    build = {"eager": eager, "meta": meta, "nucleate": nucleate}[way]
    return lambda config: lambda: build(config)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--size", required=True)
    parser.add_argument("--idle-s", type=float, default=0.0)
    parser.add_argument("--bytecode")
    args = parser.parse_args(argv)
    if args.bytecode is not None:
        sys.pycache_prefix = args.bytecode
        sys.dont_write_bytecode = False
    # So that a virtual machine gives the memory of earlier processes back to its host.
    time.sleep(args.idle_s)

    clock = Clock()
    builder = prepared(args.way)
    clock.stop("import")

    import torch

    from tests.bench.checkpoint_files import SHAPES, config_of
    from tests.bench.construct import digest
    from tests.bench.measure import report

    build = builder(config_of(SHAPES[args.size]))
    for name in ("first", "second"):
        model = None
        gc.collect()
        torch.manual_seed(SEED)
        clock.start()
        model = build()
        clock.stop(name)
        if args.way != "meta":
            clock.numbers[f"{name}_weights"] = digest(getattr(model, "module", model))
    report(clock.numbers)


if __name__ == "__main__":
    main()
