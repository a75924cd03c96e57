"""On 2 ranks: models that are built, set up, saved and loaded in other modes are those of no mode, and are trained."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nucleate import Runtime
from tests.deferred.equality import bits, named_tensors
from tests.multi.device import accelerator, device

strategy = sys.argv[1]
runtime = Runtime(accelerator=accelerator(), strategy=strategy)
runtime.launch()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(5, 7)
        self.single = nn.Parameter(torch.ones(1))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.head = nn.Linear(7, 5)
        self.register_buffer("table", torch.arange(5).float() / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.line(x * self.table)) * self.single + self.scalar


class Inner(Model):
    @torch.inference_mode()
    def __init__(self) -> None:
        super().__init__()


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def build(make: type[Model]) -> Model:
    torch.manual_seed(0)
    return make()


def train(model: Any, optimizer: Any) -> None:
    for _ in range(2):
        x = torch.full((2, 5), runtime.global_rank + 1.0, device=device())
        runtime.backward(model(x).square().mean())
        runtime.clip_gradients(model, optimizer, max_norm=10.0)
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> dict[str, bytes]:
    found = named_tensors(model)
    assert not any(tensor.is_inference() for tensor in found.values())
    return {name: bits(whole(tensor)) for name, tensor in found.items()}


def one(make: type[Model], how: bool | str | None, mode: Any, folder: Path) -> list[Any]:
    """Return what every step of a training gives."""
    seen = []
    with mode():
        if how == "plain":
            model = build(make)
        else:
            with runtime.init_module(empty_init=how):
                model = build(make)
        optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.1)
        wrapped, optimizer = runtime.setup(model, optimizer)
    seen.append(values(model))
    train(wrapped, optimizer)
    seen.append(values(model))
    with mode():
        runtime.save(folder / "last", {"model": wrapped, "optimizer": optimizer})
    train(wrapped, optimizer)
    seen.append(values(model))
    with mode():
        runtime.load(folder / "last", {"model": wrapped, "optimizer": optimizer})
    assert values(model) == seen[1]
    train(wrapped, optimizer)
    assert values(model) == seen[2]
    with mode():
        runtime.load_raw(folder / "raw.safetensors", wrapped)
    seen.append(values(model))
    train(wrapped, optimizer)
    return [*seen, values(model)]


folder = Path(runtime.broadcast(tempfile.mkdtemp() if runtime.is_global_zero else None))
if runtime.is_global_zero:
    save_file({name: tensor.contiguous() for name, tensor in Model().state_dict().items()}, folder / "raw.safetensors")
runtime.barrier()
expected = one(Model, True, torch.enable_grad, folder)
for mode in (torch.inference_mode, torch.no_grad):
    for make in (Model, Inner):
        for how in (True, False, None, "plain"):
            assert one(make, how, mode, folder) == expected, (mode, make, how)
runtime.print("every mode gives one model")
