"""Six ways to load a LLaMA, and four ways of other libraries, measured in fresh processes: seconds, memory and loss.

    python examples/03_quantized_inference.py                                # 220 million parameters, under 3 minutes
    python examples/03_quantized_inference.py --size 1B --runs 3 --tokens 32 # medians of three
    python examples/03_quantized_inference.py --size 7B --limits 20 14 8     # which way survives in so many GiB?
    python examples/03_quantized_inference.py --ways a d e --weights path/to/TinyLlama --size 1B

A small LLaMA is trained first, in at most 25 seconds. Each process loads it with the same function that is measured,
and computes its loss on held-out text: so a way that harms the weights shows. Then it loads a large model of random
bfloat16 weights against the clock; what a process does only once, such as imports, is not counted. Table and chart go
into `--folder`; all weights are temporary.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fresh_process import available_bytes, make_ready, measured, report, run_watched
from llama import SIZES, Cache, Llama, LlamaConfig, generate, hugging_face_config
from loading_results import GIB, draw, machine, survivors, table, write_csv
from nucleate import Runtime
from nucleate.materialize import materialize
from small_llama import CONFIG, held_out_loss, read_text, train

WAYS = {
    "a": "naive, plain PyTorch",
    "b": "built on the device in fp32",
    "c": "init_module, in bf16",
    "d": "lazy: init_module, load_raw",
    "e": "d + int8",
    "f": "d + nf4",
    "fabric": "Lightning Fabric",
    "transformers": "transformers",
    "transformers-int8": "transformers + int8",
    "transformers-nf4": "transformers + nf4",
}
PRECISION = {"d": "bf16-true", "e": "bnb-int8", "f": "bnb-nf4"}
NEEDS = {"e": "nucleate-bitsandbytes", "f": "nucleate-bitsandbytes", "fabric": "lightning"}  # what pip installs
NEEDS |= {"transformers": "transformers", "transformers-int8": "transformers accelerate bitsandbytes"}
NEEDS |= {"transformers-nf4": NEEDS["transformers-int8"]}

# -- the ways ------------------------------------------------------------------------------------------------


def load(way: str, config: LlamaConfig, weights: Path, device: str) -> nn.Module:
    if way == "a":
        # Everything is made in fp32 from random numbers, overwritten, cast and moved.
        model: nn.Module = Llama(config)
        model.load_state_dict(read_whole(weights))
        return model.to(device, torch.bfloat16)
    if way == "b":
        # The same, but nothing is moved. On a CPU this changes nothing.
        with torch.device(device):
            model = Llama(config)
        model.load_state_dict(read_whole(weights))
        return model.to(torch.bfloat16)
    if way == "fabric":
        return load_by_fabric(config, weights, device)
    if way.startswith("transformers"):
        return load_by_transformers(way, weights, device)
    runtime = Runtime(accelerator=device, strategy="single_device", precision=PRECISION.get(way, "bf16-true"))
    if way == "c":
        # The random numbers are made where they stay, in the dtype they stay in.
        with runtime.init_module(empty_init=False):
            model = Llama(config)
        model.load_state_dict(read_whole(weights))
    else:
        # Nothing is made: each parameter becomes a slice of a file. `setup` reads it, and quantizes it as it arrives.
        with runtime.init_module(empty_init=True):
            model = Llama(config)
        model.requires_grad_(False)  # quantized weights do not train
        runtime.load_raw(weights, model)
    return runtime.setup_module(model)


def load_by_fabric(config: LlamaConfig, weights: Path, device: str) -> nn.Module:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator=device, devices=1, precision="bf16-true")
    with fabric.init_module(empty_init=True):
        model = Llama(config)
    model.load_state_dict(read_whole(weights))
    return fabric.setup_module(model)


def load_by_transformers(way: str, weights: Path, device: str) -> nn.Module:
    from transformers import BitsAndBytesConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if way == "transformers":
        model = LlamaForCausalLM.from_pretrained(weights, dtype=torch.bfloat16, local_files_only=True)
        return model.to(device)
    if way == "transformers-int8":
        bits = BitsAndBytesConfig(load_in_8bit=True)
    else:
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        bits = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": device, "local_files_only": True}
    return LlamaForCausalLM.from_pretrained(weights, quantization_config=bits, **options)


def read_whole(weights: Path) -> dict[str, Tensor]:
    """Return all tensors; safetensors maps them, so that their pages are the file's."""
    state: dict[str, Tensor] = {}
    for path in files_of(weights):
        state.update(load_file(path))
    return state


def files_of(weights: Path) -> list[Path]:
    return sorted(weights.glob("*.safetensors")) if weights.is_dir() else [weights]


# -- one way, in a process of its own ------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> None:
    """Load and generate in this process, which `main` started, and report to it."""
    device = torch.device(args.device)
    # The first use, which no clock sees, and the proof that this way keeps the weights.
    model = load(args.way, CONFIG, args.folder / "trained", args.device).eval()
    loss = held_out_loss(model, read_text()[1].to(device))
    del model
    gc.collect()

    weights = args.weights or args.folder / "random"
    files = files_of(weights)
    if not args.limits:
        make_ready(files, most_bytes=2 * sum(path.stat().st_size for path in files))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with measured():
        started = time.perf_counter()
        model = load(args.way, SIZES[args.size], weights, args.device).eval()
        touch(model)
        load_s = time.perf_counter() - started
    device_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    # Scales and code books of quantized weights are in the state alone.
    kept_bytes = sum(tensor.nbytes for tensor in model.state_dict().values() if isinstance(tensor, Tensor))
    generates = args.tokens > 0 and not args.limits and not args.way.startswith("transformers")
    tokens_per_s = speed(model, args, device) if generates else None
    report(
        {
            "load_s": load_s,
            "device_bytes": device_bytes,
            "kept_bytes": kept_bytes,
            "loss": loss,
            "tokens_per_s": tokens_per_s,
        }
    )


def touch(model: nn.Module) -> None:
    """Read one byte of each page of everything that the model consists of, so that nothing can be put off."""
    for tensor in [*model.parameters(), *model.buffers()]:
        int(tensor.detach().reshape(-1).view(torch.uint8)[::4096].sum())


def speed(model: nn.Module, args: argparse.Namespace, device: torch.device) -> float:
    """Return how many tokens come in a second, after the first one."""
    prompt = torch.zeros(1, 16, dtype=torch.long, device=device)
    steps = generate(model, prompt, Cache(SIZES[args.size], 16 + args.tokens, device, torch.bfloat16))
    int(next(steps))
    started = time.perf_counter()
    torch.cat(list(islice(steps, args.tokens - 1))).tolist()
    elapsed_s = time.perf_counter() - started
    return float(args.tokens - 1) / elapsed_s


# -- the large checkpoint ------------------------------------------------------------------------------------


def write_random(folder: Path, config: LlamaConfig) -> None:
    """Write a folder as Hugging Face knows it, a file for each layer, of which only one is ever in memory."""
    folder.mkdir()
    runtime = Runtime(accelerator="cpu", strategy="single_device", precision="bf16-true")
    runtime.seed_everything(0)
    with runtime.init_module(empty_init=True):
        model = Llama(config)
    layers = {f"model.layers.{number}": layer for number, layer in enumerate(model.model.layers)}
    parts = {"model.embed_tokens": model.model.embed_tokens, **layers, "model.norm": model.model.norm}
    parts["lm_head"] = model.lm_head
    index: dict[str, str] = {}
    for number, (prefix, part) in enumerate(parts.items(), start=1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {f"{prefix}.{key}": tensor for key, tensor in materialize(part).state_dict().items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        del tensors
        part.to("meta")  # gives its memory back
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2))
    (folder / "config.json").write_text(json.dumps(hugging_face_config(config)))


# -- all of them ---------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.way:
        measure(args)
        return
    started = time.perf_counter()
    ways = installed(args.ways)
    if args.limits and (available := available_bytes() / GIB) < (most := max(args.limits)):
        raise SystemExit(f"A limit of {most:g} GiB cannot be tried: only {available:.1f} GiB are free. Lower --limits.")
    args.folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=args.folder, prefix="weights-") as temporary:
        weights = Path(temporary)
        loss, steps, seconds = train(weights / "trained", args.train_steps)
        (weights / "trained" / "config.json").write_text(json.dumps(hugging_face_config(CONFIG)))
        print(f"Trained a small LLaMA: {steps} steps in {seconds:.0f} s. Its held-out loss in fp32 is {loss:.4f}.")
        if not args.weights:
            write_random(weights / "random", SIZES[args.size])
            print(f"Wrote random weights, {size_of(weights / 'random') / GIB:.2f} GiB in bfloat16.")
        words = f"LLaMA {args.size} on {args.device}: {machine()}"
        if args.limits:
            limited(args, ways, weights, words)
        else:
            unlimited(args, ways, weights, words)
    print(f"Wrote the results into {args.folder}, {time.perf_counter() - started:.0f} s after the start.")


def unlimited(args: argparse.Namespace, ways: list[str], weights: Path, words: str) -> None:
    """Measure each way, in turn, A B C A B C, so that a machine that drifts does so for all; show table and chart."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(args.runs):
        for way in ways:
            runs[way].append(run_watched(command(args, way, weights)))
            print(f"{way}: {WAYS[way]}: {outcome(runs[way][-1])}", flush=True)
    results = {label(way): median(runs[way]) for way in ways}
    exact = {result["loss"] for way, result in zip(ways, results.values(), strict=True) if way in "abcd"}
    assert len(exact) <= 1, f"weights that were loaded in bf16 do not have one loss but {sorted(exact)}"
    print(f"\n{words}\n\n{table(results)}")
    (args.folder / "table.md").write_text(f"{words}\n\n{table(results)}")
    write_csv(args.folder / "table.csv", results)
    if importlib.util.find_spec("matplotlib"):
        draw(args.folder / "table.png", results, words)
    else:
        print("No chart: that needs `pip install nucleate[plot]`.")


def limited(args: argparse.Namespace, ways: list[str], weights: Path, words: str) -> None:
    """Load in each way under each limit; show which processes survive."""
    results: dict[str, dict[float, dict[str, Any]]] = {label(way): {} for way in ways}
    mapped_bytes = size_of(args.weights or weights / "random")
    for limit in args.limits:
        for way in ways:
            result = run_watched(command(args, way, weights), int(limit * GIB), mapped_bytes)
            results[label(way)][limit] = result
            print(f"{limit:g} GiB, {way}: {WAYS[way]}: {outcome(result)}", flush=True)
    print(f"\n{words}\n\n{survivors(results)}")
    (args.folder / "survivors.md").write_text(f"{words}\n\n{survivors(results)}")


def installed(ways: list[str]) -> list[str]:
    """Return those of the ways that can run; say what the others need."""
    missing = [way for way in ways if not all(is_there(name) for name in NEEDS.get(way, "").split())]
    for way in missing:
        print(f"Left out: {way} ({WAYS[way]}), for which `pip install {NEEDS[way]}`.")
    if len(missing) == len(ways):
        raise SystemExit("That leaves nothing to measure.")
    return [way for way in ways if way not in missing]


def is_there(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def command(args: argparse.Namespace, way: str, folder: Path) -> list[str]:
    own = ["--way", way, "--size", args.size, "--device", args.device, "--tokens", args.tokens, "--folder", folder]
    own += ["--weights", args.weights] if args.weights else []
    own += ["--limits", *args.limits] if args.limits else []
    return [__file__, *map(str, own)]


def label(way: str) -> str:
    return f"{way}: {WAYS[way]}" if len(way) == 1 else WAYS[way]


def outcome(result: dict[str, Any]) -> str:
    if "killed_s" in result:
        return f"killed at {result['killed_s']:.1f} s"
    return f"loaded in {result['load_s']:.2f} s, loss {result['loss']:.4f}"


def size_of(weights: Path) -> int:
    return sum(path.stat().st_size for path in files_of(weights))


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    if killed := [run for run in runs if "killed_s" in run]:
        raise SystemExit(f"A process ran out of memory after {killed[0]['killed_s']:.0f} s. Choose a smaller --size.")
    assert all(run["loss"] == runs[0]["loss"] for run in runs), "two runs of one way had different losses"
    # What the machine does not tell is None in every run.
    return {
        key: None if value is None else statistics.median(run[key] for run in runs) for key, value in runs[0].items()
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Load a LLaMA in several ways and measure each in a fresh process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="200M", help="size of the model that is measured")
    add("--ways", nargs="+", choices=WAYS, metavar="WAY", help=f"some of {', '.join(WAYS)}; with --limits a to f")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes cuda where there is one")
    add("--limits", nargs="+", type=float, metavar="GIB", help="memory limits to hold each process to (Linux, CPU)")
    add("--tokens", type=int, default=0, help="how many the large model generates, to show its speed")
    add("--runs", type=int, default=1, help="how often; the medians are shown")
    add("--train-steps", type=int, default=300, help="steps of the small model, at most 25 seconds")
    add("--weights", type=Path, help="a safetensors file or folder of that size, in place of random weights")
    add("--folder", type=Path, default=Path("runs/quantized_inference"), help="for the results; weights are temporary")
    add("--way", choices=WAYS, help=argparse.SUPPRESS)  # what this script starts itself with
    args = parser.parse_args(argv)
    if args.tokens < 0 or args.tokens == 1 or args.runs < 1 or args.train_steps < 1:
        parser.error("--tokens must be 0 or at least 2, --runs and --train-steps at least 1")
    if args.size == "7B" and args.device != "cuda" and not args.limits and not torch.cuda.is_available():
        args.limits = [20.0, 14.0, 8.0]
    if args.ways is None:
        args.ways = list("abcdef") if args.limits else list(WAYS)
    return args


if __name__ == "__main__":
    main()
