"""`generate` on what `setup` returned gives the text that it gives without us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from nucleate import Runtime
from nucleate_transformers import TransformersIntegration

WAYS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True, "temperature": 0.7, "top_k": 20},
    {"num_beams": 3, "do_sample": False},
    {"do_sample": False, "use_cache": False},
]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_greedily_sampled_and_by_beams(name: str, precision: str, tmp_path: Path) -> None:
    tiny.save(name, tmp_path)
    runtime = Runtime(
        accelerator="cpu", strategy="single_device", precision=precision, plugins=[TransformersIntegration()]
    )
    with runtime.init_module(empty_init=True):
        model = tiny.CLASSES[name].from_pretrained(tmp_path)
    model = runtime.setup(model)
    model.eval()
    expected = tiny.CLASSES[name].from_pretrained(tmp_path, dtype=runtime.precision.dtype)
    tokens = tiny.inputs_of(name)["input_ids"]
    for way in WAYS:
        torch.manual_seed(1)
        mine = model.generate(tokens, max_new_tokens=8, **way)
        torch.manual_seed(1)
        with runtime.autocast():
            theirs = expected.generate(tokens, max_new_tokens=8, **way)
        assert torch.equal(mine, theirs)


def test_mixed_precision_is_in_force_while_it_generates(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    runtime = Runtime(
        accelerator="cpu", strategy="single_device", precision="bf16-mixed", plugins=[TransformersIntegration()]
    )
    with runtime.init_module(empty_init=True):
        model = tiny.CLASSES["llama"].from_pretrained(tmp_path)
    model = runtime.setup(model)
    dtypes = set()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    model.generate(tiny.inputs_of("llama")["input_ids"], max_new_tokens=2, do_sample=False)
    assert dtypes == {torch.bfloat16}


def test_what_else_is_asked_of_a_model_is_there(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    runtime = Runtime(accelerator="cpu", strategy="single_device", plugins=[TransformersIntegration()])
    with runtime.init_module(empty_init=True):
        model = tiny.CLASSES["llama"].from_pretrained(tmp_path)
    model = runtime.setup(model)
    assert (model.device, model.dtype, model.config.vocab_size) == (torch.device("cpu"), torch.float32, 96)
    assert model.get_input_embeddings() is model.model.embed_tokens
    model.save_pretrained(tmp_path / "kept")
    again = tiny.CLASSES["llama"].from_pretrained(tmp_path / "kept")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
