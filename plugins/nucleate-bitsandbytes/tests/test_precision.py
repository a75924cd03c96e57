"""The precision: what it makes of deferred models, files and real models, and what it refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.errors import ConfigurationError, ConversionError
from nucleate.testing import peak_memory
from nucleate_bitsandbytes import BitsandbytesPrecision

MIB = 2**20
MODES = ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 192)
        self.up = nn.Linear(192, 320)
        self.down = nn.Linear(320, 192, bias=False)
        self.norm = nn.LayerNorm(192)
        self.lm_head = nn.Linear(192, 50, bias=False)
        self.register_buffer("table", torch.arange(4, dtype=torch.float32) / 3)
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        return self.lm_head(self.norm(hidden + self.down(torch.relu(self.up(hidden)))))


def expected_state(weight: Tensor, mode: str) -> dict[str, Tensor]:
    """Return what bitsandbytes makes of a weight, by its names in a state dict."""
    rows, columns = weight.shape
    if mode == "int8":
        layer: nn.Module = bitsandbytes.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False)
    else:
        quant_type, _, nested = mode.partition("-")
        layer = bitsandbytes.nn.Linear4bit(
            columns, rows, bias=False, quant_type=quant_type, compress_statistics=bool(nested)
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            weight.clone(), quant_type=quant_type, compress_statistics=bool(nested), module=layer
        )
    return dict(layer.to("cpu").state_dict())


def assert_quantized(model: nn.Module, source: nn.Module, mode: str, dtype: torch.dtype = torch.bfloat16) -> None:
    state = model.state_dict()
    for fqn in ("up", "down"):
        for name, tensor in expected_state(source.get_submodule(fqn).weight.detach().to(dtype), mode).items():
            held = state.pop(f"{fqn}.{name}")
            assert held.dtype == tensor.dtype
            assert torch.equal(held, tensor), f"{fqn}.{name}"
    for name, tensor in state.items():
        wanted = source.state_dict()[name]
        assert torch.equal(tensor, wanted if name == "table" else wanted.to(dtype)), name


def eager(dtype: torch.dtype = torch.bfloat16) -> Model:
    """Return the model as torch alone makes it in a dtype."""
    torch.manual_seed(3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Model()
    finally:
        torch.set_default_dtype(before)


def deferred(runtime: Runtime) -> Model:
    torch.manual_seed(3)
    with runtime.init_module(empty_init=True):
        return Model()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_a_deferred_model_has_the_bits_of_bitsandbytes_on_eager_weights(mode: str, dtype: torch.dtype) -> None:
    runtime = Runtime(accelerator="cpu", precision=BitsandbytesPrecision(mode, compute_dtype=dtype))
    model = runtime.setup(deferred(runtime))
    assert_quantized(model.module, eager(dtype), mode, dtype)
    assert model(torch.tensor([[1, 2]])).isfinite().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("when", ["deferred", "real"])
def test_weights_of_a_file_have_the_bits_of_bitsandbytes(tmp_path: Path, mode: str, when: str) -> None:
    source = eager(torch.float32)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    runtime = Runtime(accelerator="cpu", precision=f"bnb-{mode}")
    with runtime.init_module(empty_init=when == "deferred"):
        model = Model()
    runtime.load_raw(tmp_path / "model.safetensors", model)
    assert_quantized(runtime.setup(model).module, source, mode)


class Older(Model):
    """Older versions kept `up` in two parts and `down` transposed."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        parts = [state.pop(f"{prefix}up.weight.{part}") for part in (1, 2)]
        state[f"{prefix}up.weight"] = torch.cat(parts, dim=1)
        state[f"{prefix}down.weight"] = state[f"{prefix}down.weight"].t()
        super()._load_from_state_dict(state, prefix, *args)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["file", "state dict"])
def test_modules_that_load_in_their_own_way_are_quantized_while_they_are_read(
    tmp_path: Path, mode: str, way: str
) -> None:
    source = eager(torch.float32)
    state = dict(source.state_dict())
    up = state.pop("up.weight")
    state |= {"up.weight.1": up[:, :100].clone(), "up.weight.2": up[:, 100:].clone()}
    state["down.weight"] = state["down.weight"].t().contiguous()
    runtime = Runtime(accelerator="cpu", precision=f"bnb-{mode}")
    with runtime.init_module(empty_init=True):
        model = Older()
    if way == "file":
        save_file(state, tmp_path / "model.safetensors")
        runtime.load_raw(tmp_path / "model.safetensors", model)
    else:
        model.load_state_dict(state)
    assert_quantized(runtime.setup(model).module, source, mode)


def test_torch_itself_is_not_patched() -> None:
    before = nn.Linear, nn.Linear.__init__, nn.Linear.forward
    runtime = Runtime(accelerator="cpu", precision="bnb-nf4")
    with runtime.init_module():
        assert (nn.Linear, nn.Linear.__init__, nn.Linear.forward) == before
        assert type(Model().up) is nn.Linear


def test_layers_that_are_skipped_stay_as_they_are() -> None:
    runtime = Runtime(accelerator="cpu", precision=BitsandbytesPrecision("int8", skip=["up"]))
    model = runtime.setup(deferred(runtime)).module
    assert type(model.up) is nn.Linear
    assert model.up.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == model.down.weight.dtype == torch.int8


def test_hooks_and_attributes_of_a_layer_stay() -> None:
    runtime = Runtime(accelerator="cpu", precision="bnb-nf4")
    model = deferred(runtime)
    seen: list[str] = []
    model.up.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    model.up.label = "mine"
    model.eval()
    wrapped = runtime.setup(model)
    wrapped(torch.tensor([[1]]))
    assert seen == ["Linear4bit"]
    assert model.up.label == "mine"
    assert not model.up.training


def test_a_layer_used_twice_stays_one_layer() -> None:
    runtime = Runtime(accelerator="cpu", precision="bnb-nf4")
    with runtime.init_module(empty_init=True):
        linear = nn.Linear(64, 64)
        model = nn.Sequential(linear, nn.ReLU(), linear)
    model = runtime.setup(model).module
    assert model[0] is model[2]
    assert model[0].weight.dtype == torch.uint8


def test_a_model_that_is_one_layer_is_quantized() -> None:
    runtime = Runtime(accelerator="cpu", precision="bnb-int8")
    with runtime.init_module(empty_init=True):
        model = nn.Linear(8, 8)
    assert runtime.setup(model).weight.dtype == torch.int8


def test_the_transformer_layers_of_torch_do_not_go_around_a_quantized_layer() -> None:
    runtime = Runtime(accelerator="cpu", precision="bnb-nf4")
    with runtime.init_module(empty_init=True):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 128, batch_first=True), 2)
    model = runtime.setup(model.eval())
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        fast = model(x)
    # With gradients there is no fast path, and another kernel.
    torch.testing.assert_close(fast, model(x).detach(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_padding_does_not_bring_quantized_transformer_layers_what_they_cannot_take(mode: str) -> None:
    runtime = Runtime(accelerator="cpu", precision=f"bnb-{mode}")
    with runtime.init_module(empty_init=True):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 128, batch_first=True), 2)
    model = runtime.setup(model.eval())
    x, is_padding = torch.randn(2, 5, 64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        packed = model(x, src_key_padding_mask=is_padding)
        # Each row by itself needs no padding.
        torch.testing.assert_close(packed[1:, :3], model(x[1:, :3]), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_a_layer_without_elements_stays_as_it_is(mode: str, shape: tuple[int, int]) -> None:
    runtime = Runtime(accelerator="cpu", precision=f"bnb-{mode}")
    with warnings.catch_warnings(), runtime.init_module(empty_init=True):
        warnings.simplefilter("ignore")  # torch has nothing to initialize
        model = nn.Linear(*shape)
    assert runtime.setup(model)(torch.ones(2, shape[0])).shape == (2, shape[1])


def test_a_model_that_is_mostly_something_else_is_told(recwarn: pytest.WarningsRecorder) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(8, 512, 512))

    runtime = Runtime(accelerator="cpu", precision="bnb-nf4")
    with runtime.init_module(empty_init=True):
        model, usual = nn.ModuleDict({"gate": nn.Linear(64, 4), "experts": Experts()}), Model()
    runtime.setup(usual)
    assert not [w for w in recwarn if "stay in" in str(w.message)]
    with pytest.warns(UserWarning, match=r"256 weights .*; 2097152 others stay in torch.bfloat16: experts \(Experts\)"):
        runtime.setup(model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_told_by_name(tmp_path: Path, mode: str, value: float) -> None:
    state = eager(torch.float32).state_dict()
    state["down.weight"][100, 7] = value
    save_file(state, tmp_path / "model.safetensors")
    runtime = Runtime(accelerator="cpu", precision=f"bnb-{mode}")
    model = deferred(runtime)
    runtime.load_raw(tmp_path / "model.safetensors", model)
    with pytest.raises(ConversionError, match=r"^down\.weight: 1 (NaN|infinite)"):
        runtime.setup(model)
    with runtime.init_module(empty_init=False):
        real = Model()
    runtime.load_raw(tmp_path / "model.safetensors", real)
    with pytest.raises(ConversionError, match=r"^down\.weight: 1 (NaN|infinite)"):
        runtime.setup(real)
    used = runtime.setup(deferred(runtime))
    if mode != "int8-training":
        with pytest.raises(ConversionError, match=r"^down: 1 (NaN|infinite)"):
            runtime.load_raw(tmp_path / "model.safetensors", used)


def test_adapters_train_on_a_quantized_model() -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.a = nn.Parameter(torch.randn(4, base.in_features) * 0.1)
            self.b = nn.Parameter(torch.zeros(base.out_features, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + (x @ self.a.T) @ self.b.T

    runtime = Runtime(accelerator="cpu", precision="bnb-nf4")
    with runtime.init_module(empty_init=True):
        torch.manual_seed(0)
        model = Model().requires_grad_(False)
        model.up, model.down = Adapted(model.up), Adapted(model.down)
    model = runtime.setup(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {"up.a", "up.b", "down.a", "down.b"}
    codes = model.module.up.base.weight.detach().clone()
    optimizer = runtime.setup_optimizers(torch.optim.AdamW(trained.values(), lr=1e-2))
    tokens = torch.arange(40).view(4, 10)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten().roll(-1))
        runtime.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(model.module.up.base.weight, codes)


def test_an_optimizer_of_what_is_quantized_is_refused() -> None:
    runtime = Runtime(accelerator="cpu", precision="bnb-nf4")
    model = deferred(runtime)
    with pytest.raises(ConfigurationError, match=r"up\.weight.*quantized"):
        runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "nf8"}, "'nf8'.*nf4, nf4-dq"),
        ({"compute_dtype": torch.float64}, "float64"),
        ({"skip": "lm_head"}, r"\['lm_head'\]"),
        ({"threshold": "6"}, "threshold='6'"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"blocksize": 100}, "100"),
        ({"threshold": -1.0}, "-1.0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        BitsandbytesPrecision(**arguments)


def test_a_skip_that_names_nothing_is_refused_before_anything_changes() -> None:
    runtime = Runtime(accelerator="cpu", precision=BitsandbytesPrecision(skip=["layers.0"]))
    model = deferred(runtime)
    with pytest.raises(ConfigurationError, match=r"layers\.0"):
        runtime.setup(model)


BUILD = """
import torch
from torch import nn
from nucleate import Runtime

def build(mode):
    runtime = Runtime(accelerator="cpu", precision=f"bnb-{mode}")
    with runtime.init_module(empty_init=True):
        model = nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range(4)])
    return runtime, model

runtime, model = build("nf4")
small = nn.Linear(8, 8)
Runtime(accelerator="cpu", precision="bnb-nf4").setup(small)
Runtime(accelerator="cpu", precision="bnb-int8").setup(nn.Linear(8, 8))
"""


@pytest.mark.parametrize(("mode", "codes_mib"), [("nf4", 36), ("int8", 64)])
def test_no_weight_is_ever_whole(mode: str, codes_mib: int) -> None:
    # 32 MiB of each weight in bf16.
    build = BUILD + f"\nruntime, model = build({mode!r})"
    assert peak_memory("runtime.setup(model)", build).added_bytes < (codes_mib + 20) * MIB


OLDER = """
from safetensors.torch import save_file

class Older(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4096, 4096, bias=False) for _ in range(3))

    def _load_from_state_dict(self, state, prefix, *args):
        for i in range(3):
            halves = [state.pop(f"{i}.{half}").unflatten(0, (8, 2, 128)).transpose(1, 2).flatten(0, 2) for half in "ab"]
            state[f"layers.{i}.weight"] = torch.cat(halves)
        super()._load_from_state_dict(state, prefix, *args)

save_file({f"{i}.{half}": torch.randn(2048, 4096, dtype=torch.bfloat16) for i in range(3) for half in "ab"}, PATH)
with runtime.init_module(empty_init=True):
    model = Older()
"""


@pytest.mark.parametrize(("mode", "codes_mib"), [("nf4", 27), ("int8", 48)])
def test_what_modules_load_in_their_own_way_is_never_whole(tmp_path: Path, mode: str, codes_mib: int) -> None:
    setup = BUILD + f"PATH = {str(tmp_path / 'm.safetensors')!r}\nruntime, _ = build({mode!r})" + OLDER
    peak = peak_memory("runtime.load_raw(PATH, model); runtime.setup(model)", setup)
    # A weight is 32 MiB; a thread holds some chunks of 4 MiB, and the allocator keeps some.
    assert peak.added_bytes < (codes_mib + 24) * MIB


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_model_built_on_meta_by_hand_is_initialized_and_quantized(mode: str) -> None:
    def build() -> nn.Module:
        with torch.device("meta"):
            return nn.ModuleDict({"up": nn.Linear(192, 320), "down": nn.Linear(320, 192, bias=False)})

    source = build().to_empty(device="cpu")
    torch.manual_seed(3)
    for layer in source.children():
        layer.reset_parameters()  # type: ignore[operator]
    model = build()
    torch.manual_seed(3)
    runtime = Runtime(accelerator="cpu", strategy="single_device", precision=f"bnb-{mode}")
    runtime.setup(model)
    assert_quantized(model, source, mode)
