"""Layers that train beside frozen ones are left alone: adapters, heads, the last blocks of a model."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.errors import CheckpointError, ConfigurationError
from nucleate_bitsandbytes import BitsandbytesPrecision
from nucleate_bitsandbytes.layers import Linear4bit, Linear8bit, Linear8bitTraining

sys.path.insert(0, str(Path(__file__).parent))

from adapted_model import ADAPTERS, Lora, Model, adapted, train
from started_ranks import output_of_ranks

MODES = ["nf4", "nf4-dq", "fp4", "int8"]


@pytest.fixture(autouse=True)
def no_warning_where_layers_are_frozen() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def runtime_of(mode: str) -> Runtime:
    return Runtime(accelerator="cpu", strategy="single_device", precision=f"bnb-{mode}")


def full_file(tmp_path: Path, seed: int = 4) -> Path:
    torch.manual_seed(seed)
    save_file(Model().state_dict(), tmp_path / "full.safetensors")
    return tmp_path / "full.safetensors"


def quantized_file(tmp_path: Path, mode: str) -> Path:
    """Write the model as another run quantized it, without adapters."""
    runtime = runtime_of(mode)
    with runtime.init_module(empty_init=True):
        model = Model().requires_grad_(False)
    runtime.load_raw(full_file(tmp_path), model)
    runtime.save(tmp_path / "quantized.safetensors", runtime.setup(model))
    return tmp_path / "quantized.safetensors"


def build(runtime: Runtime, path: Path | None = None, freeze: bool = True) -> nn.Module:
    torch.manual_seed(6)
    with runtime.init_module(empty_init=True):
        model = Model().requires_grad_(not freeze)
    if path is not None:
        runtime.load_raw(path, model)
    with runtime.init_module(empty_init=True):
        return adapted(model)


def assert_adapters_train(runtime: Runtime, model: Any) -> None:
    quantized = {fqn: m for fqn, m in model.named_modules() if isinstance(m, (Linear4bit, Linear8bit))}
    assert set(quantized) == {"up.base", "down.base"}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(trained) == ADAPTERS
    assert {parameter.dtype for parameter in trained.values()} == {torch.bfloat16}
    codes = {fqn: layer.weight.detach().clone() for fqn, layer in quantized.items()}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    losses = train(runtime, model)
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in trained.items():
        assert not torch.equal(parameter, before[name]), name
    for fqn, layer in quantized.items():
        assert torch.equal(layer.weight, codes[fqn]), fqn


@pytest.mark.parametrize("stored", ["nothing", "full weights", "codes"])
@pytest.mark.parametrize("mode", MODES)
def test_adapters_of_linear_layers_train_beside_a_quantized_base(tmp_path: Path, mode: str, stored: str) -> None:
    runtime = runtime_of(mode)
    path = {"nothing": lambda: None, "full weights": lambda: full_file(tmp_path)}.get(
        stored, lambda: quantized_file(tmp_path, mode)
    )()
    assert_adapters_train(runtime, runtime.setup(build(runtime, path)))


@pytest.mark.parametrize("mode", MODES)
def test_codes_come_with_their_own_layers_also_if_nothing_was_frozen(tmp_path: Path, mode: str) -> None:
    runtime = runtime_of(mode)
    model = build(runtime, quantized_file(tmp_path, mode), freeze=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ADAPTERS)
    assert_adapters_train(runtime, runtime.setup(model))


@pytest.mark.parametrize("stored", ["full weights", "codes"])
@pytest.mark.parametrize("when", ["deferred", "real", "set up"])
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_model_that_has_its_adapters_already_is_loaded(tmp_path: Path, mode: str, when: str, stored: str) -> None:
    path = full_file(tmp_path) if stored == "full weights" else quantized_file(tmp_path, mode)
    runtime = runtime_of(mode)
    expected = runtime.setup(build(runtime, path))
    torch.manual_seed(6)
    with runtime.init_module(empty_init=when != "real"):
        model = adapted(Model().requires_grad_(False))
    if when == "set up":
        model = runtime.setup(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not in it")  # the adapters
        report = runtime.load_raw(path, model, strict=False, keys={r"^(up|down)\.": r"\1.base."})
    assert {finding.key for finding in report.missing} == ADAPTERS
    assert not report.unexpected
    if when != "set up":
        model = runtime.setup(model)
    for name, tensor in expected.state_dict().items():
        if name not in ADAPTERS:
            assert torch.equal(model.state_dict()[name], tensor), name
    assert_adapters_train(runtime, model)


def test_an_optimizer_of_the_adapters_may_be_set_up_with_the_model() -> None:
    runtime = runtime_of("nf4")
    model = build(runtime)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = runtime.setup(model, optimizer)
    assert not model.up.b.weight.any()
    runtime.backward(model(torch.arange(8).view(2, 4)).square().mean())
    optimizer.step()
    assert model.up.b.weight.dtype == torch.bfloat16
    assert model.up.b.weight.any()


def test_only_what_is_frozen_is_quantized_when_a_part_of_a_model_is_trained() -> None:
    runtime = runtime_of("int8")
    with runtime.init_module(empty_init=True):
        model = Model()
        model.up.weight.requires_grad_(False)
    model = runtime.setup(model)
    assert type(model.module.up) is Linear8bit
    assert model.up.bias.requires_grad  # it trains beside a frozen weight
    assert type(model.module.down) is nn.Linear
    assert model.down.weight.requires_grad
    assert model.down.weight.dtype == torch.bfloat16


def test_where_nothing_is_frozen_everything_is_quantized_and_a_warning_says_how_to_train() -> None:
    runtime = runtime_of("nf4")
    with runtime.init_module(empty_init=True):
        model = Model()
    with pytest.warns(
        UserWarning, match=r"'bnb-nf4' converts the weights of 2 layers and freezes them.*: up, down\."
    ) as seen:
        model = runtime.setup(model)
    [warning] = seen
    assert "`skip` of BitsandbytesPrecision" in str(warning.message)
    assert type(model.module.up) is type(model.module.down) is Linear4bit


def test_a_layer_that_skip_names_does_not_count_as_frozen() -> None:
    runtime = Runtime(accelerator="cpu", precision=BitsandbytesPrecision("nf4", skip=["up"]))
    with runtime.init_module(empty_init=True):
        model = Model()
        model.up.requires_grad_(False)
    with pytest.warns(UserWarning, match="freezes them"):
        model = runtime.setup(model)
    assert type(model.module.up) is nn.Linear
    assert type(model.module.down) is Linear4bit


def test_a_new_head_on_a_quantized_checkpoint_trains(tmp_path: Path) -> None:
    path = quantized_file(tmp_path, "nf4")
    runtime = runtime_of("nf4")
    with runtime.init_module(empty_init=True):
        base = Model()
    runtime.load_raw(path, base)
    with runtime.init_module(empty_init=True):
        model = nn.Sequential(base, nn.Linear(50, 3))
    model = runtime.setup(model)
    assert type(model.module[0].up) is Linear4bit
    assert type(model.module[1]) is nn.Linear
    assert model.module[1].weight.requires_grad


def test_codes_for_a_layer_that_trains_are_refused_by_name(tmp_path: Path) -> None:
    path = quantized_file(tmp_path, "nf4")
    runtime = runtime_of("nf4")
    with runtime.init_module(empty_init=True):
        model = Model()
        model.up.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"^down of the checkpoint are quantized, but these layers train.*Freeze"):
        runtime.load_raw(path, model)
    assert type(model.up) is type(model.down) is nn.Linear


def test_an_optimizer_of_a_layer_that_is_frozen_is_still_refused() -> None:
    runtime = runtime_of("nf4")
    with runtime.init_module(empty_init=True):
        model = Model()
    with (
        pytest.warns(UserWarning, match="freezes them"),
        pytest.raises(ConfigurationError, match=r"up\.weight.*quantized"),
    ):
        runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_int8_training_freezes_nothing_and_takes_every_layer() -> None:
    runtime = runtime_of("int8-training")
    model = runtime.setup(build(runtime))
    layers = {fqn: module for fqn, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {fqn for fqn, module in layers.items() if type(module) is not Linear8bitTraining} == {"lm_head"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == ADAPTERS
    losses = train(runtime, model)
    assert losses[-1] < 0.7 * losses[0]


def test_int8_training_leaves_the_adapters_that_skip_names() -> None:
    precision = BitsandbytesPrecision("int8-training", skip=["lm_head", "a", "b"])
    runtime = Runtime(accelerator="cpu", precision=precision)
    model = runtime.setup(build(runtime))
    assert type(model.module.up.base) is Linear8bitTraining
    assert type(model.module.up.a) is type(model.module.up.b) is nn.Linear


def test_the_layers_of_an_adapter_around_a_head_are_in_full() -> None:
    class WithHead(Model):
        def get_output_embeddings(self) -> nn.Module:
            return self.head

    runtime = runtime_of("nf4")
    with runtime.init_module(empty_init=True):
        model = WithHead().requires_grad_(False)
        model.head = Lora(nn.Linear(192, 50, bias=False).requires_grad_(False))
    model = runtime.setup(model)
    assert type(model.module.head.base) is nn.Linear
    assert type(model.module.up) is Linear4bit


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_train_adapters_as_one_process_does(tmp_path: Path, strategy: str) -> None:
    modes = ["nf4", "nf4-dq", "int8", "int8-training"]
    path = full_file(tmp_path)
    for mode in modes:
        runtime = runtime_of(mode)
        model = runtime.setup(build(runtime, path))
        losses = train(runtime, model)
        trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        torch.save({"losses": losses, "trained": trained}, tmp_path / f"{mode}.pt")
        if mode != "int8-training":
            quantized_file(tmp_path, mode).rename(tmp_path / f"{mode}.safetensors")
    output = output_of_ranks("adapters.py", 2, strategy, str(tmp_path), *modes)
    for mode in modes:
        assert output.count(f": {mode} trains") == 2


def test_the_model_of_these_tests_is_what_they_say() -> None:
    model = adapted(Model().requires_grad_(False))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == ADAPTERS
    assert isinstance(model(torch.zeros(1, 1, dtype=torch.long)), Tensor)
