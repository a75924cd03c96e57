"""A small model, its weights, and the comparison of what was loaded into it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.deferred import record_of

PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16}


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 4, bias=False))


def weights() -> dict[str, Tensor]:
    torch.manual_seed(8)
    return {name: torch.randn_like(value) for name, value in build().state_dict().items()}


def early(model: nn.Module) -> list[str]:
    """Return what of a deferred model is real."""
    return [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if record_of(tensor) is None]


def assert_loads(load: Callable[[nn.Module], object], expected: dict[str, Tensor], precision: str = "32-true") -> None:
    """Load inside the block, and compare what `setup` makes."""
    runtime = Runtime(accelerator="cpu", strategy="single_device", precision=precision)
    with runtime.init_module(empty_init=True):
        model = build()
        load(model)
    assert early(model) == []
    found = runtime.setup(model).state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value.to(PRECISIONS[precision])), name


def write_in_place(path: Path) -> None:
    """Change a file's last byte, and not its length, when the system's clock for files has gone on."""
    time.sleep(0.02)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
