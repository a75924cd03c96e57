"""Compiled models and activation checkpointing are quantized as plain models, and read what plain models have saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from nucleate import Runtime

# torch looks at the gradient of each input of a compiled part, and warns of its own look.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)
        self.down = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def in_shells(model: Any) -> nn.Module:
    model[0] = torch.compile(model[0], backend="eager")
    model[1].up = torch.compile(model[1].up, backend="eager")
    model[1] = checkpoint_wrapper(model[1])
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


@pytest.mark.parametrize("loads", ["nothing", "plain keys", "keys with parts of shells", "quantized"])
@pytest.mark.parametrize("mode", ["bnb-nf4", "bnb-int8"])
def test_a_model_in_shells_is_quantized_alike(tmp_path: Path, mode: str, loads: str) -> None:
    runtime = Runtime(accelerator="cpu", strategy="single_device", precision=mode)
    data = torch.ones(2, 64)

    def made(change: Any) -> Any:
        with runtime.init_module(empty_init=True):
            model = change(build())
        if loads == "quantized":
            runtime.load_raw(tmp_path / "quantized", model)
        elif loads != "nothing":
            runtime.load_raw(tmp_path / "weights", model)
        return runtime.setup(model)

    if loads == "plain keys":
        save_file(build().state_dict(), tmp_path / "weights")
    elif loads == "keys with parts of shells":
        torch.save(in_shells(build()).state_dict(), tmp_path / "weights")
    elif loads == "quantized":
        runtime.save(tmp_path / "quantized", runtime.setup(build()))
    plain, model = made(lambda model: model), made(in_shells)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(layer).__name__ for layer in model.modules() if "Linear" in type(layer).__name__] == [
        type(layer).__name__ for layer in plain.modules() if "Linear" in type(layer).__name__
    ]
    assert torch.equal(model(data), plain(data))
