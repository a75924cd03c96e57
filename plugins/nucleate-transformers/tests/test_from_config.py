"""What `from_config` gives inside `init_module` is what it gives without us."""

from __future__ import annotations

import pytest
import tiny
import torch

from nucleate import Runtime
from nucleate_transformers import TransformersIntegration


@pytest.mark.parametrize("empty_init", [True, False, None])
@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "bert", "gpt2", "t5", "vit", "clip", "mamba"])
def test_weights_are_equal_and_of_a_precision_that_casts(name: str, empty_init: bool | None) -> None:
    cls, config = tiny.CLASSES[name], tiny.config_of(name)
    config.dtype = "bfloat16"  # what the weights were that it was made with
    torch.manual_seed(5)
    expected = cls._from_config(tiny.config_of(name), dtype=torch.float32)
    runtime = Runtime(
        accelerator="cpu", strategy="single_device", precision="32-true", plugins=[TransformersIntegration()]
    )
    torch.manual_seed(5)
    with runtime.init_module(empty_init=empty_init):
        model = cls._from_config(config)
    tiny.assert_same(runtime.setup(model), expected)


def test_a_dtype_that_is_named_is_the_one_that_weights_are_drawn_in() -> None:
    cls = tiny.CLASSES["llama"]
    torch.manual_seed(5)
    expected = cls._from_config(tiny.config_of("llama"), dtype=torch.bfloat16)
    runtime = Runtime(
        accelerator="cpu", strategy="single_device", precision="32-true", plugins=[TransformersIntegration()]
    )
    torch.manual_seed(5)
    with runtime.init_module(empty_init=True):
        model = cls._from_config(tiny.config_of("llama"), dtype=torch.bfloat16)
    model = runtime.setup(model)
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight.float())


@pytest.mark.parametrize("empty_init", [True, False, None])
@pytest.mark.parametrize("name", ["llama-tied", "bert", "t5", "clip"])
def test_without_a_precision_a_model_has_the_dtype_of_its_configuration(name: str, empty_init: bool | None) -> None:
    runtime = Runtime(accelerator="cpu", strategy="single_device", plugins=[TransformersIntegration()])
    for dtype in (None, "bfloat16"):
        cls, configs = tiny.CLASSES[name], [tiny.config_of(name), tiny.config_of(name)]
        for config in configs:
            config.dtype = dtype
        torch.manual_seed(5)
        expected = cls._from_config(configs[0])
        torch.manual_seed(5)
        with runtime.init_module(empty_init=empty_init):
            model = cls._from_config(configs[1])
        assert expected.dtype == (torch.bfloat16 if dtype else torch.float32)
        tiny.assert_same(runtime.setup(model), expected)
