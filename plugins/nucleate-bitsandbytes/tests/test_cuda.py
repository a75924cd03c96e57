"""On a CUDA device: the kernels of bitsandbytes on some blocks make what they make of the whole weight."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nucleate import Runtime

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def theirs(weight: torch.Tensor, mode: str) -> dict[str, torch.Tensor]:
    """Return the state that bitsandbytes makes of a weight on the device."""
    rows, columns = weight.shape
    if mode == "int8":
        layer: nn.Module = bitsandbytes.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False)
    else:
        nested = mode.endswith("-dq")
        layer = bitsandbytes.nn.Linear4bit(
            columns, rows, bias=False, quant_type=mode.removesuffix("-dq"), compress_statistics=nested
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            weight.clone(), quant_type=mode.removesuffix("-dq"), compress_statistics=nested, module=layer
        )
    return dict(layer.to("cuda").state_dict())


@pytest.mark.parametrize("source", ["file", "recipe"])
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "int8"])
def test_codes_and_scales_are_those_of_bitsandbytes_on_the_device(tmp_path: Path, mode: str, source: str) -> None:
    runtime = Runtime(accelerator="cuda", precision=f"bnb-{mode}")
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(512, 768, bias=False))
    if source == "file":
        weight = torch.randn(768, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
        save_file({"0.weight": weight}, tmp_path / "a.safetensors")
        runtime.load_raw(tmp_path / "a.safetensors", model)
    else:
        torch.manual_seed(0)
        with torch.device("cuda"):
            weight = nn.Linear(512, 768, bias=False, dtype=torch.bfloat16).weight.detach()
    model = runtime.setup(model)
    state = model.state_dict()
    for name, tensor in theirs(weight.cpu(), mode).items():
        assert torch.equal(state[f"0.{name}"].cpu(), tensor.cpu()), name
    assert model.eval()(torch.randn(2, 512, device="cuda")).isfinite().all()
    assert model.train()(torch.randn(2, 512, device="cuda")).isfinite().all()


def test_a_weight_is_freed_as_soon_as_it_is_quantized() -> None:
    runtime = Runtime(accelerator="cuda", precision="bnb-nf4")
    with runtime.init_module(empty_init=True):
        model = nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range(8)])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runtime.setup(model)
    # 9 MiB of codes and scales each; one weight and what its kernel needs on top.
    assert torch.cuda.max_memory_allocated() - before < (8 * 9 + 160) * 2**20
