"""Adapters of PEFT train beside a base that nucleate-bitsandbytes quantizes: in one process and on ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nucleate import Runtime
from tests.multi.ranks import run_ranks

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("nucleate_bitsandbytes", reason="the plugin nucleate-bitsandbytes is not installed")

from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from nucleate_bitsandbytes.layers import Linear8bitTraining
from nucleate_bitsandbytes.layers.quantized import QuantizedLinear
from tests.libraries.peft_models import CONFIG, LORA, build, train, trained, whole

PRECISIONS = ["bnb-nf4", "bnb-nf4-dq", "bnb-int8"]
KINDS: dict[str, dict[str, Any]] = {
    "some layers": {},
    "all layers and biases": {"target_modules": "all-linear", "bias": "all"},
    "a head that trains": {"modules_to_save": ["lm_head"]},
    "an adapter around the head": {"target_modules": ["q_proj", "lm_head"]},
}


def runtime_of(precision: str) -> Runtime:
    return Runtime(accelerator="cpu", strategy="single_device", precision=precision)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in full, and as each precision quantizes them."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    save_file(LlamaForCausalLM(CONFIG).state_dict(), folder / "full.safetensors")
    for precision in PRECISIONS:
        runtime = runtime_of(precision)
        with runtime.init_module(empty_init=True):
            model: Any = LlamaForCausalLM(CONFIG).requires_grad_(False)
        runtime.load_raw(folder / "full.safetensors", model)
        runtime.save(folder / f"{precision}.safetensors", runtime.setup(model))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", ["nothing", "full weights", "codes"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_adapters_stay_as_they_are_and_train(folder: Path, precision: str, stored: str, kind: str) -> None:
    runtime = runtime_of(precision)
    name = {"full weights": "full", "codes": precision}.get(stored)
    model: Any = build(runtime, None if name is None else folder / f"{name}.safetensors", **KINDS[kind])
    asked = set(trained(model))
    adapters = {fqn for fqn, module in model.named_modules() if isinstance(module, nn.Linear) and "lora_" in fqn}
    assert adapters
    model = runtime.setup(model)
    assert set(trained(model)) == asked
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.bfloat16}
    modules = dict(model.named_modules())
    assert {type(modules[fqn]) for fqn in adapters} == {nn.Linear}
    quantized = {fqn: module for fqn, module in modules.items() if isinstance(module, QuantizedLinear)}
    assert len(quantized) == 7 * CONFIG.num_hidden_layers
    before = {key: whole(parameter) for key, parameter in model.named_parameters()}
    losses = train(runtime, model)
    assert losses[-1] < 0.97 * losses[0]
    changed = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert changed == asked


def test_int8_training_takes_every_layer_and_all_adapters_train(folder: Path) -> None:
    runtime = runtime_of("bnb-int8-training")
    model: Any = build(runtime, folder / "full.safetensors")
    asked = set(trained(model))
    model = runtime.setup(model)
    assert set(trained(model)) == asked
    layers = [module for module in model.modules() if isinstance(module, Linear8bitTraining)]
    num_adapted = len(LORA["target_modules"]) * CONFIG.num_hidden_layers
    assert len(layers) == 7 * CONFIG.num_hidden_layers + 2 * num_adapted
    losses = train(runtime, model)
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_train_adapters_as_one_process_does(folder: Path, strategy: str) -> None:
    for precision in PRECISIONS:
        runtime = runtime_of(precision)
        model = runtime.setup(build(runtime, folder / "full.safetensors"))
        losses = train(runtime, model)
        made = {"losses": losses, "trained": {key: whole(p) for key, p in trained(model).items()}}
        torch.save(made, folder / f"{precision}.pt")
    done = run_ranks("tests.libraries.peft_models", 2, strategy, folder, *PRECISIONS, timeout=240)
    for precision in PRECISIONS:
        assert done.stdout.count(f": {precision} trains") == 2
