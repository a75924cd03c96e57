"""Loading straight to the device, before and after `setup`, and what goes back into a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nucleate import Runtime
from nucleate.seed import RandomState
from tests.gpu.device import BUFFER_SLACK, DEVICE_TYPE, DeviceMemory, device
from tests.gpu.models import assert_same_values, deferred_by, next_numbers, wholes
from tests.zoo import ZOO

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["safetensors", "pt"])
@pytest.mark.parametrize("strategy", ["single_device", "fsdp"])
def test_weights_arrive_as_they_are_in_the_file(
    tmp_path: Path, when: str, dtype: torch.dtype, form: str, strategy: str
) -> None:
    """A tensor of several staging buffers arrives bit for bit, cast where the file has another dtype."""
    torch.manual_seed(0)
    stored = {"weight": torch.randn(9000, 4096).to(dtype), "bias": torch.randn(9000).to(dtype)}
    path = tmp_path / f"m.{form}"
    save_file(stored, path) if form == "safetensors" else torch.save(stored, path)
    runtime = Runtime(accelerator=DEVICE_TYPE, strategy=strategy)
    model = deferred_by(runtime, lambda: nn.Linear(4096, 9000))
    if when == "before":
        runtime.load_raw(path, model)
    wrapped = runtime.setup(model)
    if when == "after":
        runtime.load_raw(path, wrapped)
    assert {tensor.device for tensor in wrapped.state_dict().values()} == {device()}
    assert_same_values(wholes(model), {name: tensor.float() for name, tensor in stored.items()})


def test_loading_takes_a_staging_buffer_beside_the_model(tmp_path: Path) -> None:
    """The peak of device memory while a file is cast and loaded is the model and two staging buffers."""
    save_file({"weight": torch.rand(16384, 4096).half()}, tmp_path / "m.safetensors")
    runtime = Runtime(accelerator=DEVICE_TYPE, strategy="single_device")
    model = deferred_by(runtime, lambda: nn.Linear(4096, 16384, bias=False))
    runtime.load_raw(tmp_path / "m.safetensors", model)
    memory = DeviceMemory()
    runtime.setup(model)
    assert memory.held_bytes() <= 256.1 * 2**20
    assert memory.peak_bytes() <= 256.1 * 2**20 + BUFFER_SLACK


@pytest.mark.parametrize("name", ["a", "b.safetensors", "c.pt"])
def test_what_is_saved_from_a_device_goes_back_to_it(tmp_path: Path, name: str) -> None:
    """A model and AdamW's state are saved in each format and come back to the device bit for bit."""
    runtime = Runtime(accelerator=DEVICE_TYPE, strategy="single_device")

    def made(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = deferred_by(runtime, ZOO["gpt"][0], seed)
        return runtime.setup(model, torch.optim.AdamW(model.parameters()))

    model, optimizer = made(1)
    runtime.backward(model(ZOO["gpt"][1](torch.Generator().manual_seed(1)).to(device())).square().mean())
    optimizer.step()
    runtime.save(tmp_path / name, {"model": model, "optimizer": optimizer})
    other, resumed = made(2)
    runtime.load(tmp_path / name, {"model": other, "optimizer": resumed})
    assert_same_values(wholes(other), wholes(model))
    for ours, theirs in zip(resumed.state.values(), optimizer.state.values(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert ours[key].device == device()
            assert torch.equal(ours[key], theirs[key])


def test_the_devices_generator_is_saved_and_restored(tmp_path: Path) -> None:
    """`RandomState` in a checkpoint restores the generators of the device and of the CPU."""
    runtime = Runtime(accelerator=DEVICE_TYPE, strategy="single_device")
    torch.manual_seed(5)
    next_numbers(device())
    runtime.save(tmp_path / "a", {"random": RandomState()})
    expected = next_numbers(device())
    torch.manual_seed(6)
    runtime.load(tmp_path / "a", {"random": RandomState()})
    for ours, before in zip(next_numbers(device()), expected, strict=True):
        assert torch.equal(ours, before)
