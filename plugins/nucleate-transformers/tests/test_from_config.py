"""What `from_config` gives inside `init_module` is what it gives without us."""

from __future__ import annotations

import pytest
import tiny
import torch

from nucleate import Runtime
from nucleate_transformers import TransformersIntegration


@pytest.mark.parametrize("empty_init", [True, False, None])
@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "bert", "gpt2", "t5", "vit", "clip", "mamba"])
def test_weights_are_equal_and_of_the_precision(name: str, empty_init: bool | None) -> None:
    cls, config = tiny.CLASSES[name], tiny.config_of(name)
    config.dtype = "bfloat16"  # what the weights were that it was made with
    torch.manual_seed(5)
    expected = cls._from_config(tiny.config_of(name), dtype=torch.float32)
    runtime = Runtime(accelerator="cpu", strategy="single_device", plugins=[TransformersIntegration()])
    torch.manual_seed(5)
    with runtime.init_module(empty_init=empty_init):
        model = cls._from_config(config)
    tiny.assert_same(runtime.setup(model), expected)


def test_a_dtype_that_is_named_is_the_one_that_weights_are_drawn_in() -> None:
    cls = tiny.CLASSES["llama"]
    torch.manual_seed(5)
    expected = cls._from_config(tiny.config_of("llama"), dtype=torch.bfloat16)
    runtime = Runtime(accelerator="cpu", strategy="single_device", plugins=[TransformersIntegration()])
    torch.manual_seed(5)
    with runtime.init_module(empty_init=True):
        model = cls._from_config(tiny.config_of("llama"), dtype=torch.bfloat16)
    model = runtime.setup(model)
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight.float())
