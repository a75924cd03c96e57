"""Weights that libraries load inside the block that constructs a model for a device; models moved there and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.accelerators import CPUAccelerator, TorchAccelerator
from nucleate.seed import RandomState
from nucleate.testing import MODELS, TinyModel

SIM = torch.device("sim", 0)
LOADS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "safetensors": lambda folder: load_file(folder / "m.safetensors"),
    "torch": lambda folder: torch.load(folder / "m.pt"),
    "torch, mapped": lambda folder: torch.load(folder / "m.pt", mmap=True),
    "torch, to the device": lambda folder: torch.load(folder / "m.pt", map_location=SIM),
}


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 4, bias=False))


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, Tensor]:
    torch.manual_seed(8)
    found = {name: torch.randn_like(value) for name, value in build().state_dict().items()}
    save_file(found, tmp_path / "m.safetensors")
    torch.save(found, tmp_path / "m.pt")
    return found


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("load", LOADS)
def test_what_a_library_loads_inside_the_block_is_the_files_on_the_device(
    tmp_path: Path, stored: dict[str, Tensor], load: str, precision: str, assign: bool
) -> None:
    runtime = Runtime(accelerator="sim", precision=precision)
    with runtime.init_module(empty_init=True):
        model = build()
        model.load_state_dict(LOADS[load](tmp_path), assign=assign)
    found = runtime.setup(model).state_dict()
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        assert found[name].device == SIM
        assert torch.equal(found[name].cpu(), value.to(runtime.precision.dtype)), name


@pytest.mark.parametrize("model_class", MODELS, ids=lambda cls: cls.__name__)
def test_a_real_model_goes_to_the_device_and_back_with_gradients_and_ties(model_class: type[TinyModel]) -> None:
    torch.manual_seed(0)
    model = model_class()
    model.loss(model(model.sample())).backward()
    twin = copy.deepcopy(model)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for accelerator, device in ((TorchAccelerator("sim"), SIM), (CPUAccelerator(), torch.device("cpu"))):
        accelerator.select(0)
        assert accelerator.setup(model) is model
        for name, expected in (*twin.named_parameters(remove_duplicate=False), *twin.named_buffers()):
            assert tensors[name].device == device, name
            assert torch.equal(tensors[name].cpu(), expected), name
            if expected.grad is not None:
                assert torch.equal(tensors[name].grad.cpu(), expected.grad), name
    now = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    assert all(now[name] is tensor for name, tensor in tensors.items())
    assert torch.equal(model(model.sample()), twin(twin.sample()))


@pytest.mark.parametrize("name", ["c", "c.safetensors", "c.pt"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_a_run_with_dropout_goes_on_exactly_on_the_device(tmp_path: Path, name: str, precision: str) -> None:
    def start(seed: int) -> tuple[Runtime, Any, Any, dict[str, Any]]:
        runtime = Runtime(accelerator="sim", precision=precision)
        runtime.seed_everything(seed)
        with runtime.init_module(empty_init=True):
            model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        model, optimizer = runtime.setup(model, optimizer)
        state = {"model": model, "optimizer": optimizer, "precision": runtime.precision, "random": RandomState()}
        return runtime, model, optimizer, state

    def train(runtime: Runtime, model: Any, optimizer: Any) -> list[float]:
        losses = []
        for _ in range(3):
            batch = torch.rand(16, 4, device=runtime.device)
            loss = model(batch).square().mean()
            optimizer.zero_grad()
            runtime.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        return losses

    runtime, model, optimizer, state = start(1)
    train(runtime, model, optimizer)
    runtime.save(tmp_path / name, state)
    expected = train(runtime, model, optimizer)
    again, other, resumed, state = start(2)
    again.load(tmp_path / name, state)
    assert train(again, other, resumed) == expected
    moments = resumed.state[other.module[0].weight]
    assert moments["exp_avg"].device == moments["exp_avg_sq"].device == SIM
