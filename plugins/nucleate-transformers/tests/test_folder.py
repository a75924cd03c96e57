"""A model that is set up becomes a folder that `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from nucleate import Runtime
from nucleate.errors import UsageError
from nucleate_transformers import TransformersIntegration, save_pretrained


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "t5", "bert"])
def test_what_is_saved_is_loaded_without_us(name: str, tmp_path: Path) -> None:
    tiny.save(name, tmp_path / "given")
    runtime = Runtime(
        accelerator="cpu", strategy="single_device", precision="bf16-true", plugins=[TransformersIntegration()]
    )
    with runtime.init_module(empty_init=True):
        model = tiny.CLASSES[name].from_pretrained(tmp_path / "given")
    model = runtime.setup(model)
    save_pretrained(runtime, tmp_path / "kept", model, max_shard_size="40KB")
    again, report = tiny.CLASSES[name].from_pretrained(tmp_path / "kept", output_loading_info=True)
    assert not any(report.values())
    assert again.dtype == torch.bfloat16
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_a_model_of_others_is_refused(tmp_path: Path) -> None:
    runtime = Runtime(accelerator="cpu", strategy="single_device")
    with pytest.raises(UsageError, match=r"not Linear\. Use runtime\.save"):
        save_pretrained(runtime, tmp_path / "kept", runtime.setup(nn.Linear(2, 2)))
