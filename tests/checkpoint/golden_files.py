"""Checkpoints of released versions: the state that they hold, and the script that writes them.

`python -m tests.checkpoint.golden_files 0.1` writes `golden/0.1`, once for each version and never again. On two ranks
(`torchrun --nproc-per-node 2 -m tests.checkpoint.golden_files 0.1`) the script writes the folders whose names end in
`2-ranks`.
"""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nucleate import Runtime

GOLDEN = Path(__file__).parent / "golden"
#: The path below a version's folder, and the options of `save`.
FORMATS: dict[str, dict[str, Any]] = {
    "dcp": {},
    "safetensors": {"format": "safetensors"},
    "safetensors-in-parts": {"format": "safetensors", "max_shard_size": 500},
    "one-file.safetensors": {},
    "torch.pt": {},
}


class Model(nn.Module):
    """A model with a tie, a buffer and several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.inner = nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(4), linear=nn.Linear(4, 4)))
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scales", torch.empty(5, dtype=torch.bfloat16))
        self.empty = nn.Parameter(torch.empty(0, 3))


def values(model: nn.Module) -> nn.Module:
    """Give the tensors of a model values that no random generator makes."""
    with torch.no_grad():
        for number, tensor in enumerate(model.state_dict(keep_vars=True).values()):
            tensor.copy_((torch.arange(tensor.numel()).view(tensor.shape) % 97 + number).to(tensor.dtype))
    return model


def gradients(model: nn.Module) -> None:
    """Give the parameters gradients that no loss makes."""
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.25 * (number + 1))


def training_state(runtime: Runtime) -> dict[str, Any]:
    """Return the state whose checkpoint each version keeps, without random numbers, after a step of the optimizer."""
    model = values(Model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, foreach=False)
    wrapped, optimizer = runtime.setup(model, optimizer)
    if runtime.world_size == 1:  # Sharded parameters would need sharded gradients.
        gradients(model)
        optimizer.step()
    return {"model": wrapped, "optimizer": optimizer, **plain_values()}


def plain_values() -> dict[str, Any]:
    """Return the values and tensors that stand beside the model."""
    tensors: dict[str, Tensor] = {
        "float64": torch.tensor([1.5, -0.0, float("inf")], dtype=torch.float64),
        "float8": torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn),
        "int8": torch.arange(-3, 3, dtype=torch.int8),
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j]),
        "scalar": torch.tensor(7),
        "none": torch.empty(2, 0),
    }
    return {
        "tensors": tensors,
        "step": 12,
        "rate": 0.1,
        "name": "a name with ü and \n",
        "done": None,
        "nested": {"list": [1, 2.5, "three", (4, True)], 5: b"bytes"},
    }


def main(version: str) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    runtime = Runtime(accelerator="cpu", strategy="fsdp" if ranks > 1 else "single_device")
    state = training_state(runtime)
    for name, options in FORMATS.items():
        path = GOLDEN / version / (name if ranks == 1 else f"{name}-{ranks}-ranks")
        if ranks == 1 or not Path(name).suffix:
            runtime.save(path, state, **options)


if __name__ == "__main__":
    main(*sys.argv[1:])
