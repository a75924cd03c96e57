"""The large checkpoint: a Llama in bf16 with random weights, in 3 safetensors files that are written tensor by tensor.

    python -m tests.bench.large_files FOLDER 7b

At no time more than one tensor is in memory. The weights are known by a fingerprint of every 509th element: enough to
notice a wrong place or a wrong file, and quick.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.bench.checkpoint_files import SEED, SHAPES, Files, config_of, fingerprint, num_parameters
from tests.bench.held import local_of
from tests.bench.measure import report

NUM_SHARDS = 3
#: A prime, so that the samples lie in every column.
STRIDE = 509
_BYTES_PER_ELEMENT = 2


def large_files(root: Path, size: str) -> Files:
    """Return where the checkpoint of a size is."""
    # A folder of its own: those that `checkpoint_files` writes have other shards and other fingerprints.
    return Files(root / "large", size, "bf16")


def make(root: Path, size: str) -> None:
    """Write the files of one size, unless they are there.

    Raises:
        OSError: The disk is full.
    """
    files = large_files(root, size)
    done = files.folder.parent / "weights"
    if done.exists():
        return
    files.folder.mkdir(parents=True, exist_ok=True)
    config = config_of(SHAPES[size])
    shapes = _shapes(config)
    generator = torch.Generator().manual_seed(SEED)
    samples: list[tuple[str, Tensor]] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_split(shapes), 1):
        name = f"model-{number:05}-of-{NUM_SHARDS:05}.safetensors"
        with open(files.folder / name, "wb") as file:
            _write_header(file, {key: shapes[key] for key in shard})
            for key in shard:
                value = _value(shapes[key], generator)
                samples.append((key, _sample(value)))
                data: Any = value.view(torch.uint8).numpy()
                file.write(data)
            file.flush()
            # What is not on the disk yet cannot be taken out of memory.
            os.fsync(file.fileno())
        weight_map |= dict.fromkeys(shard, name)
    total = _BYTES_PER_ELEMENT * num_parameters(SHAPES[size])
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (files.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config.save_pretrained(files.folder)
    os.sync()
    done.write_text(fingerprint(samples))


def sampled_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of every 509th element of all parameters, whichever rank holds it."""
    return fingerprint(_samples(model.named_parameters()))


@torch.no_grad()
def _samples(parameters: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    held = {name: local_of(parameter).detach() for name, parameter in parameters}
    counts = {name: tensor.numel() for name, tensor in held.items()}
    starts = dict.fromkeys(held, 0)
    if dist.is_initialized():
        every: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, counts)
        starts = {name: sum(each[name] for each in every[: dist.get_rank()]) for name in held}
    # A part begins somewhere between two samples of the whole.
    mine = {name: _sample(tensor, -starts[name] % STRIDE) for name, tensor in held.items()}
    if not dist.is_initialized():
        yield from mine.items()
        return
    parts: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    for name in held:
        yield name, torch.cat([part[name] for part in parts])


def _sample(tensor: Tensor, start: int = 0) -> Tensor:
    return tensor.reshape(-1)[start::STRIDE].clone(memory_format=torch.contiguous_format).view(-1)


def _shapes(config: Any) -> dict[str, torch.Size]:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _split(shapes: dict[str, torch.Size]) -> list[list[str]]:
    total = sum(shape.numel() for shape in shapes.values())
    shards: list[list[str]] = [[] for _ in range(NUM_SHARDS)]
    begin = 0
    for key, shape in shapes.items():
        shards[min(NUM_SHARDS * (begin + shape.numel() // 2) // total, NUM_SHARDS - 1)].append(key)
        begin += shape.numel()
    return shards


def _write_header(file: BinaryIO, shapes: dict[str, torch.Size]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for key, shape in shapes.items():
        end = begin + _BYTES_PER_ELEMENT * shape.numel()
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _value(shape: torch.Size, generator: torch.Generator) -> Tensor:
    value = torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)
    # The scales of norms are near 1, so that two loaders of the same weights also say the same tokens.
    return value.add_(1) if len(shape) == 1 else value


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("size", choices=SHAPES)
    args = parser.parse_args(argv)
    make(args.root, args.size)
    report({"num_parameters": num_parameters(SHAPES[args.size])})


if __name__ == "__main__":
    main()
