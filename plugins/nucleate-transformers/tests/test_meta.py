"""Models that were built on the meta device by hand are initialized by the rules of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import PreTrainedModel

from nucleate import Runtime


def built_on_meta(name: str) -> Any:
    with torch.device("meta"):
        return tiny.CLASSES[name]._from_config(tiny.config_of(name), dtype=torch.float32)


def reset_by_hand(module: nn.Module, rule: PreTrainedModel) -> None:
    """Call a module's own method and the rule of the nearest model for it, after those of its children."""
    rule = module if isinstance(module, PreTrainedModel) else rule
    for child in module.children():
        reset_by_hand(child, rule)
    holds = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    if holds and hasattr(module, "reset_parameters"):
        module.reset_parameters()
    rule._init_weights(module)


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "bert", "gpt2", "t5", "vit", "mamba"])
def test_a_model_on_meta_gets_what_the_rules_make_by_hand(name: str) -> None:
    expected = built_on_meta(name).to_empty(device="cpu")
    expected.tie_weights()
    torch.manual_seed(5)
    reset_by_hand(expected, expected)
    after = torch.rand(3)
    model = built_on_meta(name)
    torch.manual_seed(5)
    wrapped = Runtime(accelerator="cpu", strategy="single_device").setup(model)
    assert torch.equal(torch.rand(3), after)
    tiny.assert_same(model, expected)
    assert tiny.outputs_of(wrapped, name).isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_rules_are_those_of_the_constructor(name: str) -> None:
    torch.manual_seed(5)
    constructed = tiny.CLASSES[name]._from_config(tiny.config_of(name), dtype=torch.float32)
    model = built_on_meta(name)
    Runtime(accelerator="cpu", strategy="single_device").setup(model)
    for (key, tensor), expected in zip(model.named_parameters(), constructed.parameters(), strict=True):
        assert tensor.std().item() == pytest.approx(expected.std().item(), rel=0.3, abs=1e-6), key
    for (key, buffer), table in zip(model.named_buffers(), constructed.buffers(), strict=True):
        assert torch.equal(buffer, table), key


def test_a_checkpoint_leaves_tables_of_frequencies_to_the_rules(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    expected = tiny.CLASSES["llama"].from_pretrained(tmp_path)
    model = built_on_meta("llama")
    runtime = Runtime(accelerator="cpu", strategy="single_device", precision="bf16-true")
    runtime.load_raw(tmp_path, model)
    state = torch.get_rng_state()
    runtime.setup(model)
    assert torch.equal(torch.get_rng_state(), state)
    for (key, tensor), stored in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(tensor, stored.bfloat16()), key
    for (key, buffer), table in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert buffer.dtype == torch.float32, key
        assert torch.equal(buffer, table), key
