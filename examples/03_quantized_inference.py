"""How soon, and in how much memory, does a LLaMA say its first word? Five ways to load it, each in a fresh process.

    python examples/03_quantized_inference.py                                     # 1.1B parameters, all ways
    python examples/03_quantized_inference.py --size 7B --device cuda --runs 3    # medians of three
    python examples/03_quantized_inference.py --ways acd --weights path/to/TinyLlama

Without `--weights` random ones are written first, once for each size, in bfloat16. Every way loads and runs the
smallest size before the clock starts, so that imports are not counted. The table and the chart go into `--folder`.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.util
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fresh_process import make_ready, measured, report, run_watched
from llama import SIZES, Cache, Llama, LlamaConfig, generate
from nucleate import Runtime
from nucleate.materialize import materialize
from nucleate.registry import PRECISIONS

WAYS = {
    "a": "plain PyTorch",
    "b": "bf16 on the device",
    "c": "b + lazy loading",
    "d": "c + int8",
    "e": "c + nf4",
}
PRECISION = {"b": "bf16-true", "c": "bf16-true", "d": "bnb-int8", "e": "bnb-nf4"}
GIB = 2**30

# -- the ways ------------------------------------------------------------------------------------------------


def load(way: str, config: LlamaConfig, weights: Path, device: str) -> nn.Module:
    if way == "a":
        # Everything is made in fp32 from random numbers, read beside it, copied into it, cast, moved.
        model: nn.Module = Llama(config)
        model.load_state_dict(read_whole(weights))
        return model.to(device, torch.bfloat16).eval()
    runtime = Runtime(accelerator=device, strategy="single_device", precision=PRECISION[way])
    if way == "b":
        # The same, but made at once in the dtype and where it will stay.
        with runtime.init_module(empty_init=False):
            model = Llama(config)
        model.load_state_dict(read_whole(weights))
    else:
        # Nothing is made: each parameter becomes a slice of a file, which `setup` reads, and quantizes as it arrives.
        with runtime.init_module(empty_init=True):
            model = Llama(config)
        runtime.load_raw(weights, model)
    return runtime.setup_module(model).eval()


def read_whole(weights: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in files_of(weights):
        state.update(load_file(path))
    return state


# -- one way, in a process of its own ------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> None:
    """Load and generate in this process, which `main` started, and report to it."""
    device = torch.device(args.device)
    started = time.perf_counter()
    generate_some(load(args.way, SIZES["tiny"], checkpoint(args.folder, "tiny"), args.device), SIZES["tiny"], 2, device)
    gc.collect()
    first_use_s = time.perf_counter() - started

    weights = args.weights or checkpoint(args.folder, args.size)
    files = files_of(weights)
    make_ready(files, most_bytes=3 * sum(path.stat().st_size for path in files))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with measured():
        started = time.perf_counter()
        model = load(args.way, SIZES[args.size], weights, args.device)
        touch(model)
        load_s = time.perf_counter() - started
    device_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    tokens, first_token_s, tokens_per_s = generate_some(model, SIZES[args.size], args.tokens, device)
    report(
        {
            "first_use_s": first_use_s,
            "load_s": load_s,
            "device_bytes": device_bytes,
            "first_token_s": first_token_s,
            "tokens_per_s": tokens_per_s,
            "tokens": tokens,
        }
    )


def touch(model: nn.Module) -> None:
    """Read one byte of each page of everything that the model consists of, so that nothing can be put off."""
    for tensor in [*model.parameters(), *model.buffers()]:
        int(tensor.detach().reshape(-1).view(torch.uint8)[::4096].sum())


def generate_some(
    model: nn.Module, config: LlamaConfig, count: int, device: torch.device
) -> tuple[list[int], float, float]:
    """Return the tokens, the seconds to the first one, and how many of the others came in a second."""
    prompt = torch.randint(config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0)).to(device)
    cache = Cache(config, prompt.size(1) + count, device, torch.bfloat16)
    started = time.perf_counter()
    steps = generate(model, prompt, cache)
    tokens = [int(next(steps))]
    first = time.perf_counter()
    tokens += torch.cat(list(islice(steps, count - 1))).flatten().tolist()
    return tokens, first - started, (count - 1) / (time.perf_counter() - first)


# -- the checkpoint ------------------------------------------------------------------------------------------


def checkpoint(folder: Path, size: str) -> Path:
    return folder / f"llama-{size}"


def write_random(path: Path, config: LlamaConfig) -> None:
    """Write a folder as Hugging Face knows it, a file for each layer, of which only one is ever in memory."""
    draft = path.with_name(f"{path.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
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
        save_file(tensors, draft / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        del tensors
        part.to("meta")  # gives its memory back
    (draft / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2))
    draft.rename(path)  # whole or absent


def files_of(weights: Path) -> list[Path]:
    return sorted(weights.glob("*.safetensors")) if weights.is_dir() else [weights]


# -- all of them ---------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.way:
        measure(args)
        return
    ways = installed([way for way in WAYS if way in args.ways])
    for size in {"tiny"} if args.weights else {"tiny", args.size}:
        if not checkpoint(args.folder, size).exists():
            print(f"Writing random weights into {checkpoint(args.folder, size)}")
            write_random(checkpoint(args.folder, size), SIZES[size])

    # In turn, A B C A B C, so that a machine that drifts does so for all.
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(args.runs):
        for way in ways:
            runs[way].append(run_watched([__file__, *arguments(args, way)]))
            print(f"{way}: {WAYS[way]}, loaded in {runs[way][-1]['load_s']:.2f} s", flush=True)
    results = {way: median(runs[way]) for way in ways}
    agree(results)

    table = as_table(results)
    words = f"LLaMA {args.size} on {args.device}, {torch.get_num_threads()} threads, {args.tokens} tokens"
    print(f"\n{words}\n\n{table}")
    (args.folder / "table.md").write_text(f"{words}\n\n{table}")
    with (args.folder / "table.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, ["way", *next(iter(results.values()))])
        rows.writeheader()
        rows.writerows({"way": WAYS[way], **result} for way, result in results.items())
    if importlib.util.find_spec("matplotlib"):
        draw(args.folder / "table.png", results, words)
    else:
        print("No chart: that needs `pip install nucleate[plot]`.")
    print(f"Wrote the results into {args.folder}")


def installed(ways: list[str]) -> list[str]:
    """Return those of the ways whose precision is there; say what the others need."""
    missing = [way for way in ways if way != "a" and PRECISION[way] not in PRECISIONS.names()]
    if missing:
        print(f"Left out: {', '.join(missing)}, for which `pip install nucleate-bitsandbytes`.")
    if len(missing) == len(ways):
        raise SystemExit("That leaves nothing to measure.")
    return [way for way in ways if way not in missing]


def arguments(args: argparse.Namespace, way: str) -> list[str]:
    own = ["--way", way, "--size", args.size, "--device", args.device, "--tokens", args.tokens, "--folder", args.folder]
    return list(map(str, [*own, "--weights", args.weights] if args.weights else own))


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    assert all(run["tokens"] == runs[0]["tokens"] for run in runs), "two runs of one way said different things"
    numbers = {key: [run[key] for run in runs] for key in runs[0]}
    # What the machine does not tell is None in every run.
    return {
        key: some[0] if key == "tokens" or None in some else statistics.median(some) for key, some in numbers.items()
    }


def agree(results: dict[str, dict[str, Any]]) -> None:
    """Add to each result how many of its first tokens are those of full precision; those must be one another's."""
    exact = [way for way in results if way in "abc"]
    for result in results.values():
        if not exact:
            result["same_tokens"] = None
            continue
        pairs = zip(result["tokens"], results[exact[0]]["tokens"], strict=True)
        result["same_tokens"] = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    for way in exact:
        assert results[way]["same_tokens"] == len(results[way]["tokens"]), (
            f"{way} said other words than {exact[0]} after {results[way]['same_tokens']} tokens"
        )


def as_table(results: dict[str, dict[str, Any]]) -> str:
    """Return a table in Markdown, one way in each row; what was not measured is left empty."""
    columns = {
        "load, s": ("load_s", 1, "{:.2f}"),
        "first token, s": ("first_token_s", 1, "{:.2f}"),
        "host memory, GiB": ("anonymous_bytes", GIB, "{:.2f}"),
        "with mapped files, GiB": ("host_bytes", GIB, "{:.2f}"),
        "device memory, GiB": ("device_bytes", GIB, "{:.2f}"),
        "tokens/s": ("tokens_per_s", 1, "{:.1f}"),
        "same tokens": ("same_tokens", 1, "{:.0f}"),
    }
    columns = {
        title: column
        for title, column in columns.items()
        if any(result.get(column[0]) is not None for result in results.values())
    }
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for way, result in results.items():
        cells = (form.format(result[key] / unit) for key, unit, form in columns.values())
        lines.append(f"| {way}: {WAYS[way]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, results: dict[str, dict[str, Any]], words: str) -> None:
    from matplotlib.figure import Figure

    ink, colors = "#333333", {"a": "#9a9a9a", "b": "#8fb8e8", "c": "#2a78d6", "d": "#d1541c", "e": "#e39a2d"}
    figure = Figure(figsize=(10, 0.9 + 0.45 * len(results)), dpi=150, layout="constrained")
    seconds, memory, speed = figure.subplots(1, 3, sharey=True)
    figure.suptitle(words, x=0.01, ha="left", fontsize=11, color=ink)
    labels, shades = [f"{way}: {WAYS[way]}" for way in results], [colors[way] for way in results]
    where = "device_bytes" if any(result["device_bytes"] is not None for result in results.values()) else ""
    panels = {
        "seconds to load": (seconds, ["load_s"], 1, 2),
        f"peak GiB{': host, device (hatched)' if where else ''}": (memory, ["anonymous_bytes", where], GIB, 2),
        "tokens/s": (speed, ["tokens_per_s"], 1, 1),
    }
    for title, (axes, keys, unit, digits) in panels.items():
        shown = [key for key in keys if any(result.get(key) is not None for result in results.values())]
        height = 0.72 / max(1, len(shown))
        for number, key in enumerate(shown):
            values = [(result.get(key) or 0) / unit for result in results.values()]
            places = [row + (number - (len(shown) - 1) / 2) * height for row in range(len(values))]
            hatch = "////" if key == "device_bytes" else ""
            bars = axes.barh(places, values, height, color=shades, hatch=hatch, edgecolor="white", linewidth=0)
            axes.bar_label(bars, [f"{value:.{digits}f}" for value in values], padding=3, fontsize=9, color=ink)
        axes.set_title(title, loc="left", fontsize=10, color=ink)
        axes.margins(x=0.18)
        axes.set_xticks([])
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(length=0, labelcolor=ink)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.spines["left"].set_color("#bbbbbb")
    seconds.invert_yaxis()
    figure.savefig(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Load a LLaMA in five ways and let it generate.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="1B", help="size of the model")
    add("--ways", default="".join(WAYS), help=", ".join(f"{way}: {words}" for way, words in WAYS.items()))
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes cuda where there is one")
    add("--tokens", type=int, default=64, help="how many to generate")
    add("--runs", type=int, default=1, help="how often; the medians are shown")
    add("--weights", type=Path, help="a safetensors file or folder of that size, in place of random weights")
    add("--folder", type=Path, default=Path("runs/quantized_inference"), help="for random weights, table and chart")
    add("--way", choices=WAYS, help=argparse.SUPPRESS)  # what this script starts itself with
    args = parser.parse_args(argv)
    if unknown := set(args.ways) - set(WAYS):
        parser.error(f"--ways {args.ways}: {', '.join(sorted(unknown))} is none of {', '.join(WAYS)}")
    if args.tokens < 2 or args.runs < 1 or not args.ways:
        parser.error("--tokens must be at least 2, --runs at least 1, and --ways must name one")
    return args


if __name__ == "__main__":
    main()
