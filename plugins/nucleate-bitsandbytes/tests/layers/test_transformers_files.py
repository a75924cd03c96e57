"""Folders that transformers wrote load into these layers, and transformers loads what these layers save."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nucleate_bitsandbytes.layers import FourBitWeight, Linear4bit, Linear8bit

transformers = pytest.importorskip("transformers")


def with_our_layers(model: nn.Module) -> nn.Module:
    """Put layers of ours, of zeros, in place of bitsandbytes' layers."""
    for name, module in list(model.named_modules()):
        shape = (getattr(module, "out_features", 0), getattr(module, "in_features", 0))
        if isinstance(module, bnb.nn.Linear4bit):
            numel = shape[0] * shape[1]
            zeros = FourBitWeight(
                codes=torch.zeros(numel // 2, 1, dtype=torch.uint8), absmax=torch.zeros(numel // 64), quant_type="fp4"
            )
            layer: nn.Module = Linear4bit(shape[1], shape[0], zeros, compute_dtype=module.compute_dtype)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            codes, scales = torch.zeros(shape, dtype=torch.int8), torch.zeros(shape[0])
            layer = Linear8bit(shape[1], shape[0], codes, scales, threshold=module.state.threshold)
        else:
            continue
        model.set_submodule(name, layer)
    return model


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "fp4", "int8"])
def test_both_load_what_the_other_saves(tmp_path: Path, kind: str) -> None:
    quant_type, _, nested = kind.partition("-")
    if kind == "int8":
        quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=bool(nested),
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=128,  # bitsandbytes fails in eval mode where blocks do not fit into rows
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    full, theirs_path, ours_path = (tmp_path / name for name in ("full", "theirs", "ours"))
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(full)

    def load(path: Path) -> nn.Module:
        given = {"quantization_config": quantization} if path == full else {}
        return transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map="cpu", **given)

    theirs = load(full)
    theirs.save_pretrained(theirs_path)
    stored = load_file(theirs_path / "model.safetensors")

    ours = with_our_layers(load(full))
    result = ours.load_state_dict(stored)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        logits = ours.eval()(tokens).logits
        assert torch.equal(logits, theirs.eval()(tokens).logits)

    state = ours.state_dict()
    assert set(state) == set(stored)
    for name, tensor in stored.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name

    ours_path.mkdir()
    save_file(state, ours_path / "model.safetensors", metadata={"format": "pt"})
    (ours_path / "config.json").write_text((theirs_path / "config.json").read_text())
    assert "quantization_config" in json.loads((ours_path / "config.json").read_text())
    with torch.no_grad():
        assert torch.equal(load(ours_path).eval()(tokens).logits, logits)
