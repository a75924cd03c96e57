"""Quantized checkpoints: ours and others', into models of every state, equal, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from nucleate import Runtime
from nucleate.errors import CheckpointError, PluginNotFoundError
from nucleate_bitsandbytes import BitsandbytesPrecision

MODES = ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"]
TOKENS = torch.tensor([[1, 2, 3]])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 128)
        self.up = nn.Linear(128, 192)
        self.down = nn.Linear(192, 128, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        return hidden + self.down(torch.relu(self.up(hidden)))


def set_up(mode: str, seed: int, runtime: Runtime | None = None) -> tuple[Runtime, nn.Module]:
    torch.manual_seed(seed)
    runtime = runtime or Runtime(accelerator="cpu", precision=f"bnb-{mode}")
    with runtime.init_module(empty_init=True):
        model = Model()
    return runtime, runtime.setup(model)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name
    for state in (True, False):
        assert torch.equal(one.train(state)(TOKENS), other.train(state)(TOKENS))


def use(model: nn.Module, times: int) -> None:
    """Let the layers change what they keep: eval kernels want another order of codes."""
    with torch.no_grad():
        for _ in range(times):
            model.eval()(TOKENS)


@pytest.mark.parametrize("format", ["dcp", "safetensors", "model.safetensors", "model.pt"])
@pytest.mark.parametrize("into", ["deferred", "fresh", "quantized", "used"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_saved_is_loaded_again(tmp_path: Path, mode: str, into: str, format: str) -> None:
    runtime, source = set_up(mode, seed=1)
    use(source, 2)
    path = tmp_path / format
    runtime.save(path, source, format=format if "." not in format else None)
    if into in ("deferred", "fresh"):
        torch.manual_seed(2)
        with runtime.init_module(empty_init=into == "deferred"):
            model = Model()
        assert runtime.load_raw(path, model).is_exact
        model = runtime.setup(model)
    else:
        _, model = set_up(mode, seed=2)
        use(model, 2 * (into == "used"))
        assert runtime.load_raw(path, model).is_exact
    assert_same(model, source)


@pytest.mark.parametrize("mode", MODES)
def test_a_training_state_goes_on(tmp_path: Path, mode: str) -> None:
    runtime, source = set_up(mode, seed=1)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        runtime.backward(model.train()(TOKENS).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return runtime.setup_optimizers(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))

    optimizer = optimizer_of(source)
    train(source, optimizer)
    use(source, 1)
    runtime.save(tmp_path / "state", {"model": source, "optimizer": optimizer})
    _, model = set_up(mode, seed=2, runtime=runtime)
    resumed = optimizer_of(model)
    runtime.load(tmp_path / "state", {"model": model, "optimizer": resumed})
    train(source, optimizer)
    train(model, resumed)
    assert_same(model, source)


@pytest.mark.parametrize("when", ["quantized", "used"])
@pytest.mark.parametrize("mode", MODES)
def test_full_weights_are_quantized_into_a_model_that_is_set_up(tmp_path: Path, mode: str, when: str) -> None:
    torch.manual_seed(1)
    full = {name: tensor.clone() for name, tensor in Model().state_dict().items()}
    save_file(full, tmp_path / "full.safetensors")
    runtime = Runtime(accelerator="cpu", precision=f"bnb-{mode}")
    with runtime.init_module(empty_init=True):
        expected = Model()
    runtime.load_raw(tmp_path / "full.safetensors", expected)
    expected = runtime.setup(expected)
    runtime, model = set_up(mode, seed=2)
    use(model, 2 * (when == "used"))
    runtime.load_raw(tmp_path / "full.safetensors", model)
    assert_same(model, expected)
    # And by torch's own way, which casts to nothing before.
    by_torch = set_up(mode, seed=3)[1]
    by_torch.load_state_dict({name: tensor.bfloat16() for name, tensor in full.items()})
    assert_same(by_torch, expected)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("into", ["deferred", "quantized"])
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
def test_codes_without_statistics_are_refused_and_nothing_changes(
    tmp_path: Path, mode: str, into: str, strict: bool
) -> None:
    runtime, source = set_up(mode, seed=1)
    marks = ("absmax", "quant_map", "quant_state", "SCB", "weight_format")
    state = {name: t for name, t in source.state_dict().items() if not any(mark in name for mark in marks)}
    save_file(state, tmp_path / "a.safetensors")
    if into == "quantized":
        _, model = set_up(mode, seed=2)
    else:
        with runtime.init_module(empty_init=True):
            model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()} if into == "quantized" else {}
    if into == "deferred" and not strict:
        # A plain layer has no place for codes: it keeps its recipe, and the report says so.
        with pytest.warns(UserWarning, match=r"up\.weight"):
            runtime.load_raw(tmp_path / "a.safetensors", model, strict)
        return
    with pytest.raises(CheckpointError, match=r"(?s)up.*weight"):
        runtime.load_raw(tmp_path / "a.safetensors", model, strict)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("saved", "mode", "hint"), [("nf4", "int8", "bnb-nf4"), ("int8", "nf4", "bnb-int8"), ("fp4", "nf4", "bnb-fp4")]
)
def test_codes_of_another_kind_are_refused_with_the_precision_that_takes_them(
    tmp_path: Path, saved: str, mode: str, hint: str
) -> None:
    runtime, source = set_up(saved, seed=1)
    runtime.save(tmp_path / "a.safetensors", source)
    runtime = Runtime(accelerator="cpu", precision=f"bnb-{mode}")
    with runtime.init_module(empty_init=True):
        model = Model()
    with pytest.raises(CheckpointError, match=hint):
        runtime.load_raw(tmp_path / "a.safetensors", model)
    with pytest.raises(CheckpointError, match="up"):
        runtime.load_raw(tmp_path / "a.safetensors", runtime.setup(model))


def test_codes_for_a_layer_that_is_skipped_are_refused(tmp_path: Path) -> None:
    runtime, source = set_up("nf4", seed=1)
    runtime.save(tmp_path / "a.safetensors", source)
    runtime = Runtime(accelerator="cpu", precision=BitsandbytesPrecision("nf4", skip=["up"]))
    with runtime.init_module(empty_init=True):
        model = Model()
    with pytest.raises(CheckpointError, match=r"up .*skip=\['up'\]"):
        runtime.load_raw(tmp_path / "a.safetensors", model)


@pytest.mark.parametrize("format", ["dcp", "safetensors", "model.safetensors", "model.pt"])
@pytest.mark.parametrize("into", ["deferred", "quantized"])
@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_a_layer_in_two_places_is_loaded_again(tmp_path: Path, mode: str, into: str, format: str) -> None:
    runtime = Runtime(accelerator="cpu", precision=f"bnb-{mode}")

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        with runtime.init_module(empty_init=True):
            model = Model()
            model.again, model.other = model.up, nn.Linear(128, 192)
            model.other.bias = model.up.bias
        return model

    source = runtime.setup(build(1))
    runtime.save(tmp_path / format, source, format=None if "." in format else format)
    target = build(2)
    if into == "deferred":
        runtime.load_raw(tmp_path / format, target)
        target = runtime.setup(target)
    else:
        target = runtime.setup(target)
        runtime.load_raw(tmp_path / format, target)
    assert target.module.again is target.module.up
    assert target.module.other.bias is target.module.up.bias
    assert_same(source, target)


@pytest.mark.parametrize("damage", ["quant_map", "json", "shape", "missing"])
def test_damaged_statistics_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    runtime, source = set_up("nf4", seed=1)
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    if damage == "quant_map":
        state["up.weight.quant_map"][3] = 0.5
    elif damage == "json":
        state["up.weight.quant_state.bitsandbytes__nf4"][0] = 0
    elif damage == "shape":
        state["up.weight.absmax"] = state["up.weight.absmax"][:-1].clone()
    else:
        del state["up.weight.absmax"]
    save_file(state, tmp_path / "a.safetensors")
    for model in (set_up("nf4", seed=2)[1], None):
        if model is None:
            with runtime.init_module(empty_init=True):
                model = Model()
        with pytest.raises(CheckpointError, match="up"):
            runtime.load_raw(tmp_path / "a.safetensors", model)


CONFIGS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    "nf4-dq": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
LLAMA = LlamaConfig(
    vocab_size=100,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    torch.manual_seed(0)
    LlamaForCausalLM(LLAMA).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("mode", CONFIGS)
def test_what_transformers_wrote_is_loaded_with_equal_values(tmp_path: Path, full: Path, mode: str, used: bool) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        full, quantization_config=CONFIGS[mode], dtype=torch.bfloat16, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path)
    runtime = Runtime(accelerator="cpu", precision=f"bnb-{mode}")
    with runtime.init_module(empty_init=True):
        model = LlamaForCausalLM(LLAMA)
    if used:
        model = runtime.setup(model)
        with torch.no_grad():
            model.eval()(TOKENS)
    assert runtime.load_raw(tmp_path, model).is_exact
    if not used:
        model = runtime.setup(model)
    # Quantizing while loading gives the same model.
    with runtime.init_module(empty_init=True):
        quantized = LlamaForCausalLM(LLAMA)
    runtime.load_raw(full, quantized)
    quantized = runtime.setup(quantized)
    stored = load_file(tmp_path / "model.safetensors")
    for one in (model, quantized):
        state = one.state_dict()
        assert state.keys() == stored.keys()
        for name, tensor in stored.items():
            if "quant_state" not in name:  # Text, whose dtype is said in other words.
                assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("mode", CONFIGS)
def test_transformers_loads_what_we_saved(tmp_path: Path, full: Path, mode: str) -> None:
    runtime = Runtime(accelerator="cpu", precision=f"bnb-{mode}")
    with runtime.init_module(empty_init=True):
        model = LlamaForCausalLM(LLAMA)
    runtime.load_raw(full, model)
    model = runtime.setup(model)
    with torch.no_grad():
        model.eval()(TOKENS)
    config = LlamaConfig.from_pretrained(full)
    config.quantization_config = CONFIGS[mode]
    runtime.save(tmp_path / "out", model, format="safetensors")
    config.save_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu", dtype=torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(
        full, quantization_config=CONFIGS[mode], dtype=torch.bfloat16, device_map="cpu"
    )
    with torch.no_grad():
        assert torch.equal(theirs.train()(TOKENS).logits, expected.train()(TOKENS).logits)


def test_the_plugin_is_named_where_it_is_not_installed() -> None:
    with pytest.raises(PluginNotFoundError, match="bnb-nf4"):
        Runtime(accelerator="cpu", precision="bnb-nf5")
