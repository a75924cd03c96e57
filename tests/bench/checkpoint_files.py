"""The checkpoints that are loaded: Llamas with random weights from a fixed seed, as files of several kinds.

    python -m tests.bench.checkpoint_files FOLDER 10m

A size has one set of values, in fp32 and rounded to bf16, each as 5 safetensors shards with their index and
`config.json`, and as one `.pt` file. What is in them is known by its fingerprint, so that every loader can be checked.
What is read must be where the measurement says: `read_all` puts files into memory, `drop` takes them out of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nucleate.checkpoint.stored.direct import Residency
from tests.bench.measure import report
from tests.bench.model import DTYPES

SEED = 1
NUM_SHARDS = 5
BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int = 256
    mlp_dim: int = 0

    @property
    def hidden_dim(self) -> int:
        """The width inside a perceptron."""
        return self.mlp_dim or 11 * self.dim // 4


SHAPES = {
    "micro": Shape(num_layers=2, dim=32, num_heads=4, num_kv_heads=2, vocab_size=64),
    "1m": Shape(num_layers=4, dim=128, num_heads=4, num_kv_heads=2),
    "10m": Shape(num_layers=6, dim=384, num_heads=6, num_kv_heads=2),
    "100m": Shape(num_layers=12, dim=640, num_heads=10, num_kv_heads=2, vocab_size=32_000),
    "1b": Shape(num_layers=22, dim=2048, num_heads=32, num_kv_heads=4, vocab_size=32_000),  # TinyLlama: 1.10 billion
    # Llama 2 7B: 6.74 billion. Only `tests.bench.large_files` writes it, which never holds all of it.
    "7b": Shape(num_layers=32, dim=4096, num_heads=32, num_kv_heads=32, vocab_size=32_000, mlp_dim=11_008),
}


@dataclass(frozen=True)
class Files:
    """The checkpoint of one size with weights of one dtype.

    Attributes:
        root: The folder of all checkpoints.
        size: Which of `SHAPES`.
        dtype: Which of `DTYPES`.
    """

    root: Path
    size: str
    dtype: str

    @property
    def folder(self) -> Path:
        """The folder of safetensors shards, with an index and a configuration."""
        return self.root / self.size / self.dtype

    @property
    def torch_file(self) -> Path:
        """The same weights as `torch.save` writes them."""
        return self.root / self.size / f"{self.dtype}.pt"

    @property
    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.shards)

    def config(self) -> Any:
        return config_of(SHAPES[self.size])

    def read_by(self, torch_file: bool) -> list[Path]:
        """Return the files that a loader reads."""
        return [self.torch_file] if torch_file else self.shards

    def weights(self) -> str:
        """Return the fingerprint of the weights in bf16."""
        return (self.root / self.size / "weights").read_text()


def make(root: Path, size: str) -> None:
    """Write all files of one size, unless they are there."""
    done = root / size / "weights"
    if done.exists():
        return
    values = dict(_values(SHAPES[size]))
    for name, dtype in DTYPES.items():
        files = Files(root, size, name)
        files.folder.mkdir(parents=True, exist_ok=True)
        cast = {key: value.to(dtype) for key, value in values.items()}
        _save_shards(cast, files.folder)
        files.config().save_pretrained(files.folder)
        torch.save(cast, files.torch_file)
    # What is not on the disk yet cannot be taken out of memory.
    os.sync()
    done.write_text(fingerprint((key, value.bfloat16()) for key, value in values.items()))


def config_of(shape: Shape) -> Any:
    """Return the transformers configuration of an untied Llama."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.hidden_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        tie_word_embeddings=False,
    )


def num_parameters(shape: Shape) -> int:
    """Return how many parameters there are, without making them."""
    key_dim = shape.dim // shape.num_heads * shape.num_kv_heads
    attention = 2 * shape.dim**2 + 2 * shape.dim * key_dim
    layer = attention + 3 * shape.dim * shape.hidden_dim + 2 * shape.dim
    return shape.num_layers * layer + 2 * shape.vocab_size * shape.dim + shape.dim


def kept_bytes(shape: Shape, form: str) -> int:
    """Return about how many bytes a model keeps as bf16, int8 or nf4, without making it."""
    # Neither the embedding nor the head nor norms are quantized.
    rest = 2 * shape.vocab_size * shape.dim + (2 * shape.num_layers + 1) * shape.dim
    # With scales: 4 bytes for each row, or 4 bytes for each 64 elements.
    per_element = {"bf16": 2.0, "int8": 1.0 + 4 / shape.dim, "nf4": 0.5 + 4 / 64}[form]
    return int((num_parameters(shape) - rest) * per_element) + 2 * rest


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a fingerprint of every bit of the tensors, whatever their order."""
    total = hashlib.sha256()
    for name, digest in sorted((name, _digest(tensor)) for name, tensor in tensors):
        total.update(f"{name} {digest}".encode())
    return total.hexdigest()


def read_all(paths: Iterable[Path]) -> int:
    """Read files from one end to the other, in large blocks into the same memory; return how many bytes there were."""
    block = bytearray(BLOCK_BYTES)
    num_bytes = 0
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(block):
                num_bytes += count
    return num_bytes


def drop(paths: Iterable[Path]) -> None:
    """Take files out of the page cache.

    Raises:
        RuntimeError: Some of it stays there.
    """
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if is_cached(path):
            raise RuntimeError(f"{path.name} is still in the page cache: nothing cold can be measured here")


def is_cached(path: Path) -> bool:
    """Return whether one of 64 places in a file is in the page cache."""
    size = path.stat().st_size
    with open(path, "rb", buffering=0) as file:
        # Not by a read that does not wait (`RWF_NOWAIT`), which makes the system read ahead.
        pages = Residency(file.fileno(), size)
        return any(pages.holds(offset, 1) for offset in range(0, size, max(size // 64, 1)))


def _values(shape: Shape) -> Iterator[tuple[str, Tensor]]:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config_of(shape))
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        yield name, torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator)


def _save_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(NUM_SHARDS)]
    begin = 0
    for key, tensor in tensors.items():
        # By where its middle lies, which leaves no shard empty that a tensor is large enough for.
        shards[min(NUM_SHARDS * (begin + tensor.nbytes // 2) // total, NUM_SHARDS - 1)][key] = tensor
        begin += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{NUM_SHARDS:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _digest(tensor: Tensor) -> str:
    data: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("size", choices=SHAPES)
    args = parser.parse_args(argv)
    make(args.root, args.size)
    report({"num_parameters": num_parameters(SHAPES[args.size])})


if __name__ == "__main__":
    main()
