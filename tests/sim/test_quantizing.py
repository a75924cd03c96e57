"""Weights that are quantized while they are made for the simulated device, and while they are read from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nucleate import Runtime

pytest.importorskip("nucleate_bitsandbytes")
SIM = torch.device("sim", 0)


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64)).requires_grad_(False)


def is_description(name: str) -> bool:
    """Return whether a tensor is how the library describes codes; it makes these on the host."""
    return name.endswith("weight_format") or "quant_state.bitsandbytes" in name


def made(accelerator: str, mode: str, path: Path | None) -> dict[str, Tensor]:
    runtime = Runtime(accelerator=accelerator, strategy="single_device", precision=f"bnb-{mode}")
    torch.manual_seed(3)
    with runtime.init_module(empty_init=True):
        model = build()
    if path is not None:
        runtime.load_raw(path, model)
    return dict(runtime.setup(model).state_dict())


@pytest.mark.parametrize("mode", ["int8", "nf4", "fp4"])
def test_what_is_read_is_quantized_to_the_bits_of_the_cpu(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "m.safetensors"
    save_file({name: torch.randn_like(value) for name, value in build().state_dict().items()}, path)
    expected, found = made("cpu", mode, path), made("sim", mode, path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].device == SIM or is_description(name), name
        assert torch.equal(found[name].cpu(), value), name


@pytest.mark.parametrize("mode", ["int8", "nf4", "fp4"])
def test_what_is_drawn_on_the_device_is_quantized_there(mode: str) -> None:
    found = made("sim", mode, None)
    assert {value.device for name, value in found.items() if not is_description(name)} == {SIM}
    assert found["0.weight"].dtype in (torch.int8, torch.uint8)
    again = made("sim", mode, None)
    assert all(torch.equal(found[name], again[name]) for name in found)
