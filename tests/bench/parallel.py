"""The costs of parallelism on two ranks: steps beside another commit, and a setup beside torch's own way.

`python -m tests.bench.parallel steps ../other-tree --rounds 15` trains under `fsdp` and `ddp` on both trees in turn.

`python -m tests.bench.parallel setup --rounds 5` makes a Llama of transformers on `tp=2`, and beside it by
`parallelize_module`, `to_empty` and `init_weights`, each in fresh processes. torch's way does not make eager's weights.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLAN = {
    "model.embed_tokens": "rowwise",
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
    "lm_head": "colwise_gathered",
}


def train(strategy: str, num_steps: int) -> float:
    """Return the CPU time of one step of a small model in milliseconds. Ranks that wait for each other take none."""
    import torch
    from torch import nn

    from nucleate import Runtime

    runtime = Runtime(accelerator="cpu", strategy=strategy)
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    wrapped, optimizer = runtime.setup(model, torch.optim.AdamW(model.parameters()))
    batch = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(runtime.global_rank))

    def step() -> None:
        runtime.backward(wrapped(batch).square().mean())
        runtime.clip_gradients(wrapped, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(10):
        step()
    runtime.barrier()
    start = time.process_time()
    for _ in range(num_steps):
        step()
    return (time.process_time() - start) / num_steps * 1e3


def make(way: str) -> float:
    """Return the seconds from the constructor to a model on two ranks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, vocab_size=32000
    )
    if way == "nucleate":
        from nucleate import Runtime
        from nucleate.dimensions import TensorParallel
        from nucleate.strategies import Parallel

        runtime = Runtime(accelerator="cpu", strategy=Parallel(mesh={"tp": 2}, dimensions=[TensorParallel(PLAN)]))
        runtime.launch()
        start = time.perf_counter()
        with runtime.init_module(empty_init=True):
            model: Any = LlamaForCausalLM(config)
        runtime.setup(model)
        return time.perf_counter() - start
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (2,))
    styles: dict[str, Callable[[str], Any]] = {
        "colwise": lambda name: ColwiseParallel(),
        "rowwise": lambda name: RowwiseParallel(input_layouts=Replicate()) if "embed" in name else RowwiseParallel(),
        "colwise_gathered": lambda name: ColwiseParallel(output_layouts=Replicate()),
    }
    start = time.perf_counter()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    parallelize_module(model, mesh, {name: styles[style](name) for name, style in PLAN.items()})
    model.to_empty(device="cpu")
    model.init_weights()
    taken = time.perf_counter() - start
    dist.destroy_process_group()
    return taken


def worker(what: str, options: list[str]) -> None:
    result = train(options[0], int(options[1])) if what == "steps" else make(options[0])
    # One write: two ranks would mix the words of `print`.
    sys.stdout.write(f"TAKEN {json.dumps(result)}\n")


def measure(tree: Path, *arguments: str) -> float:
    """Run two ranks on the sources of a tree, and return the mean of their results."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, *torchrun, str(Path(__file__)), "worker", *arguments]
    variables = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr[-3000:]}")
    return statistics.mean(float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("TAKEN "))


def compare(name: str, here: Callable[[], float], other: Callable[[], float], rounds: int) -> None:
    """Print the median ratio of two measurements in turn, with a bootstrap interval of 95 percent."""
    ratios, pairs = [], []
    for number in range(rounds):
        pair = [here(), other()] if number % 2 else [other(), here()][::-1]
        pairs.append(pair)
        ratios.append(pair[0] / pair[1])
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{name}: {statistics.median(ratios):.3f} [{medians[50]:.3f}, {medians[1949]:.3f}]; medians {mine:.3f} and "
        f"{theirs:.3f}"
    )


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["steps", "setup"])
    parser.add_argument("other", nargs="?", type=Path, help="the root of the tree of the other commit")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    if options.what == "setup":
        compare(
            "setup of Llama on tp=2, seconds",
            lambda: measure(ROOT, "setup", "nucleate"),
            lambda: measure(ROOT, "setup", "torch"),
            options.rounds,
        )
        return
    for strategy in ("fsdp", "ddp"):
        compare(
            f"a step under {strategy}, CPU milliseconds",
            lambda: measure(ROOT, "steps", strategy, str(options.steps)),  # noqa: B023 - called at once
            lambda: measure(options.other.resolve(), "steps", strategy, str(options.steps)),  # noqa: B023
            options.rounds,
        )


if __name__ == "__main__":
    main()
