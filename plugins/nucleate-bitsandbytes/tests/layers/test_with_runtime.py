"""Quantized layers are deferred, set up, saved and loaded by nucleate like any others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate_bitsandbytes.layers import FourBitWeight, Linear4bit, Linear8bit


def build(kind: str) -> nn.Module:
    bias = nn.Parameter(torch.randn(32, dtype=torch.float32))
    if kind == "int8":
        codes = torch.randint(-127, 128, (32, 64), dtype=torch.int8)
        return nn.Sequential(Linear8bit(64, 32, codes, torch.rand(32, dtype=torch.float32) + 0.5, bias))
    codes = torch.randint(0, 256, (32 * 64 // 2, 1), dtype=torch.uint8)
    absmax = torch.rand(32, dtype=torch.float32) + 0.5
    weight = FourBitWeight(codes=codes, absmax=absmax, quant_type="nf4")
    if kind == "nf4-dq":
        codes_of_scales = torch.randint(0, 256, (32,), dtype=torch.uint8)
        weight = FourBitWeight(
            codes=codes,
            absmax=codes_of_scales,
            quant_type="nf4",
            nested_absmax=torch.rand(1, dtype=torch.float32),
            offset=torch.ones((), dtype=torch.float32),
        )
    return nn.Sequential(Linear4bit(64, 32, weight, bias, compute_dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "int8"])
def test_deferred_layers_are_set_up_saved_and_loaded_with_equal_values(kind, tmp_path, assert_same_state):
    runtime = Runtime(accelerator="cpu")
    torch.manual_seed(0)
    expected = build(kind)
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        original = build(kind)
    assert "deferred" in repr(original[0].weight)
    # What is packed with the offset of double quantization is not known yet; all else is told.
    unknown = {"0.weight.quant_state.bitsandbytes__nf4"} if kind == "nf4-dq" else set()
    assert set(original.state_dict()) == set(expected.state_dict()) - unknown
    model = runtime.setup(original)
    assert_same_state(original, expected)
    x = torch.randn(3, 64)
    with torch.no_grad():
        y = model.eval()(x)
        assert torch.equal(y, expected.eval()(x))
    runtime.save(tmp_path / "model.safetensors", model)
    other = runtime.setup(build(kind))
    with torch.no_grad():
        assert not torch.equal(other.eval()(x), y)
        runtime.load_raw(tmp_path / "model.safetensors", other)
        assert torch.equal(other(x), y)
    assert_same_state(other, expected)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_no_precision_casts_the_scales(kind):
    layers = build(kind)
    before = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    model = Runtime(accelerator="cpu", precision="bf16-true").setup(layers)
    assert model(torch.randn(3, 64)).isfinite().all()
    for name, tensor in model.state_dict().items():
        if not name.endswith("bias"):
            assert torch.equal(tensor, before[name]), name
