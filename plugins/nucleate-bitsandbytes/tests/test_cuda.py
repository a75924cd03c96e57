"""On a CUDA device: the kernels of bitsandbytes on some blocks make what they make of the whole weight."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nucleate import Runtime
from nucleate.precision import Precision
from nucleate.testing import PrecisionSuite
from nucleate_bitsandbytes import BitsandbytesPrecision

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def their_layer(weight: torch.Tensor, mode: str) -> nn.Module:
    """Return the layer that bitsandbytes makes of a weight on the device."""
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
    return layer.to("cuda")


class OnCUDA(PrecisionSuite):
    accelerator = "cuda"
    updates = 0.97
    quantizes = True
    mode: str

    def make_precision(self) -> Precision:
        return BitsandbytesPrecision(self.mode)


class TestNF4(OnCUDA):
    """The precision suite with `bnb-nf4`."""

    mode = "nf4"


class TestInt8(OnCUDA):
    """The precision suite with `bnb-int8`."""

    mode = "int8"


@pytest.mark.parametrize("source", ["file", "recipe"])
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "int8"])
def test_codes_and_scales_are_those_of_bitsandbytes_on_the_device(tmp_path: Path, mode: str, source: str) -> None:
    """A weight from a file or a recipe gets the bits of bitsandbytes' own CUDA kernels on the whole weight."""
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
    for name, tensor in their_layer(weight.cpu(), mode).state_dict().items():
        assert torch.equal(state[f"0.{name}"].cpu(), tensor.cpu()), name
    assert model.eval()(torch.randn(2, 512, device="cuda")).isfinite().all()
    assert model.train()(torch.randn(2, 512, device="cuda")).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_weight_of_several_staging_buffers_is_quantized_while_it_is_read(
    tmp_path: Path, mode: str, dtype: torch.dtype
) -> None:
    """A weight of 128 MiB in bfloat16 passes through the pinned ring, and has the bits of bitsandbytes afterwards."""
    generator = torch.Generator("cuda").manual_seed(1)
    weight = torch.empty(8192, 8192, dtype=dtype, device="cuda").normal_(generator=generator).cpu()
    save_file({"0.weight": weight}, tmp_path / "a.safetensors")
    runtime = Runtime(accelerator="cuda", precision=f"bnb-{mode}")
    with runtime.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(8192, 8192, bias=False))
    runtime.load_raw(tmp_path / "a.safetensors", model)
    state = runtime.setup(model).state_dict()
    for name, tensor in their_layer(weight.bfloat16(), mode).state_dict().items():
        assert torch.equal(state[f"0.{name}"].cpu(), tensor.cpu()), name


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "int8"])
def test_a_layer_computes_the_product_with_what_its_codes_stand_for(mode: str) -> None:
    """The product with a quantized weight is close to that with the weight itself, and to that of bitsandbytes."""
    runtime = Runtime(accelerator="cuda", precision=f"bnb-{mode}")
    weight = torch.randn(768, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    linear = nn.Linear(512, 768, bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    model = runtime.setup(nn.Sequential(linear)).eval()
    batch = torch.randn(16, 512, generator=torch.Generator().manual_seed(2)).bfloat16().cuda()
    with torch.inference_mode():
        ours, their = model(batch).float(), their_layer(weight, mode)(batch).float()
    exact = batch.float() @ weight.cuda().float().T
    # Four bits keep about a tenth of a normal number's size uncertain, eight bits about a hundredth.
    assert (ours - exact).norm() / exact.norm() < (0.03 if mode == "int8" else 0.2)
    assert (ours - their).norm() / exact.norm() < 0.02


def test_a_weight_is_freed_as_soon_as_it_is_quantized() -> None:
    """The peak while eight weights are quantized is the codes, the scales and a few buffers, not the weights."""
    runtime = Runtime(accelerator="cuda", precision="bnb-nf4")
    with runtime.init_module(empty_init=True):
        model = nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range(8)])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runtime.setup(model)
    # 9 MiB of codes and scales each; one weight and what its kernel needs on top.
    assert torch.cuda.max_memory_allocated() - before < (8 * 9 + 160) * 2**20
