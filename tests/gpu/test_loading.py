"""Loading straight to a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nucleate import Runtime

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", ["single_device", "fsdp"])
def test_weights_arrive_as_they_are_in_the_file(tmp_path: Path, when: str, dtype: torch.dtype, strategy: str) -> None:
    torch.manual_seed(0)
    # More rows than one pinned buffer holds.
    stored = {"weight": torch.randn(9000, 4096).to(dtype), "bias": torch.randn(9000).to(dtype)}
    save_file(stored, tmp_path / "m.safetensors")
    runtime = Runtime(accelerator="cuda", strategy=strategy)
    with runtime.init_module(empty_init=True):
        model = nn.Linear(4096, 9000)
    if when == "before":
        runtime.load_raw(tmp_path / "m.safetensors", model)
    wrapped = runtime.setup(model)
    if when == "after":
        runtime.load_raw(tmp_path / "m.safetensors", wrapped)
    for name, tensor in wrapped.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        assert whole.device.type == "cuda"
        assert torch.equal(whole.cpu(), stored[name].float())


def test_what_is_saved_from_a_device_goes_back_to_it(tmp_path: Path) -> None:
    runtime = Runtime(accelerator="cuda", strategy="single_device")
    model = runtime.setup(nn.Linear(64, 32))
    optimizer = runtime.setup_optimizers(torch.optim.AdamW(model.parameters()))
    runtime.backward(model(torch.ones(2, 64, device="cuda")).sum())
    optimizer.step()
    for name in ("a", "b.safetensors", "c.pt"):
        runtime.save(tmp_path / name, {"model": model, "optimizer": optimizer})
        other = runtime.setup(nn.Linear(64, 32))
        resumed = runtime.setup_optimizers(torch.optim.AdamW(other.parameters()))
        runtime.load(tmp_path / name, {"model": other, "optimizer": resumed})
        assert torch.equal(other.weight, model.weight)
        moments = [next(iter(each.state.values()))["exp_avg"] for each in (optimizer, resumed)]
        assert moments[1].device.type == "cuda"
        assert torch.equal(*moments)
