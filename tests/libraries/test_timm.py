"""`timm.create_model(checkpoint_path=)` inside `init_module`: no parameter is made early, values are timm's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nucleate import Runtime
from nucleate.deferred import record_of
from tests.architectures.stand_ins import make_torchvision_importable
from tests.first_use.imports import assert_same_imports

make_torchvision_importable()

import timm  # noqa: E402

PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16}


def write(model: nn.Module, path: Path) -> None:
    state: Any = model.state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.name.startswith("trained"):
        torch.save({"epoch": 7, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("file", ["model.pth", "model.safetensors", "trained.pth.tar"])
@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_parameters_stay_deferred_and_get_the_files_values(
    tmp_path: Path, name: str, file: str, precision: str
) -> None:
    torch.manual_seed(2)
    write(timm.create_model(name), tmp_path / file)
    expected = timm.create_model(name, checkpoint_path=str(tmp_path / file))
    runtime = Runtime(accelerator="cpu", strategy="single_device", precision=precision)
    with runtime.init_module(empty_init=True):
        model = timm.create_model(name, checkpoint_path=str(tmp_path / file))
    assert [key for key, value in model.named_parameters() if record_of(value) is None] == []
    made = runtime.setup(model).module
    for key, value in expected.named_parameters():
        assert torch.equal(made.get_parameter(key), value.to(PRECISIONS[precision])), key
    for key, value in expected.named_buffers():
        found = made.get_buffer(key)
        assert torch.equal(found, value.to(found.dtype)), key


def test_a_first_model_imports_nothing_that_timm_does_without_nucleate() -> None:
    assert_same_imports("timm")
