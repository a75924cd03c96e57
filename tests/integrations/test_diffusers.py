"""`from_pretrained` of diffusers inside `init_module`: nothing is made early, and the values are diffusers' own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from nucleate import Runtime
from nucleate.testing.memory import assert_peak_memory_below
from tests.device import cpu_only
from tests.integrations.weights import early

pytestmark = cpu_only("what a library loads for the CPU is bound to its file where the CPU is recorded for")

MIB = 2**20
UNET: dict[str, Any] = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16, "attention_head_dim": 4,
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (16, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 8,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "UNet2DConditionModel": (UNet2DConditionModel, UNET),
    "AutoencoderKL": (AutoencoderKL, VAE),
}
FORMS: dict[str, dict[str, Any]] = {
    "safetensors": {},
    "safetensors in shards": {"max_shard_size": "100KB"},
    "bin": {"safe_serialization": False},
    "bin in shards": {"safe_serialization": False, "max_shard_size": "100KB"},
}
Store = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    diffusers.logging.set_verbosity(diffusers.logging.CRITICAL)
    diffusers.logging.disable_progress_bar()
    yield
    diffusers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    stored: dict[tuple[str, str], Path] = {}

    def folder(name: str, form: str) -> Path:
        if (name, form) not in stored:
            stored[name, form] = tmp_path_factory.mktemp("model")
            cls, config = MODELS[name]
            torch.manual_seed(4)
            cls(**config).save_pretrained(stored[name, form], **FORMS[form])
        return stored[name, form]

    return folder


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained_makes_nothing_early_and_gives_diffusers_own_values(
    store: Store, name: str, form: str, low_cpu_mem_usage: bool, dtype: torch.dtype | None
) -> None:
    cls = MODELS[name][0]
    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "torch_dtype": dtype, "use_safetensors": "bin" not in form}
    expected = cls.from_pretrained(store(name, form), **options)
    for precision in ("bf16-true",) if dtype is not None else ("32-true", "bf16-true"):
        runtime = Runtime(accelerator="cpu", strategy="single_device", precision=precision)
        with runtime.init_module(empty_init=True):
            model = cls.from_pretrained(store(name, form), **options)
        assert early(model) == []
        assert not model.training
        made = runtime.setup(model)
        target = torch.float32 if precision == "32-true" else torch.bfloat16
        for key, value in expected.named_parameters():
            assert torch.equal(made.module.get_parameter(key), value.to(target)), key
        assert [key for key, _ in made.module.named_buffers()] == [key for key, _ in expected.named_buffers()]
        for key, value in expected.named_buffers():
            assert torch.equal(made.module.get_buffer(key), value), key


def test_the_model_computes_what_diffusers_own_computes(store: Store) -> None:
    folder = store("UNet2DConditionModel", "safetensors")
    runtime = Runtime(accelerator="cpu", strategy="single_device")
    with runtime.init_module(empty_init=True):
        model = UNet2DConditionModel.from_pretrained(folder)
    inputs = torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 16)
    with torch.no_grad():
        expected = UNet2DConditionModel.from_pretrained(folder)(*inputs).sample
        assert torch.equal(runtime.setup(model)(*inputs).sample, expected)


def test_a_damaged_file_is_an_error_of_diffusers_that_names_it(store: Store, tmp_path: Path) -> None:
    folder = store("AutoencoderKL", "safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    whole = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(whole[:-10])
    runtime = Runtime(accelerator="cpu", strategy="single_device")
    with runtime.init_module(empty_init=True):
        with pytest.raises(OSError, match="diffusion_pytorch_model.safetensors"):
            AutoencoderKL.from_pretrained(tmp_path)


_SETUP = """
import diffusers, torch
from diffusers import UNet2DConditionModel
from nucleate import Runtime
diffusers.logging.set_verbosity(diffusers.logging.CRITICAL)
runtime = Runtime(accelerator="cpu", strategy="single_device", precision={precision!r})
def load(folder):
    with runtime.init_module(empty_init=True):
        model = UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage={low!r}, use_safetensors={safe!r})
    return runtime.setup(model)
load({small!r})
"""


@pytest.mark.parametrize(
    ("form", "precision", "low_cpu_mem_usage"),
    [
        pytest.param("safetensors", "32-true", True, marks=pytest.mark.long),
        ("safetensors", "bf16-true", False),
        pytest.param("bin", "bf16-true", True, marks=pytest.mark.long),
    ],
)
def test_no_more_than_what_is_kept_is_allocated(
    store: Store, large: Callable[[str], Path], form: str, precision: str, low_cpu_mem_usage: bool
) -> None:
    folder = large(form)
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    assert size_bytes > 100 * MIB
    kept = size_bytes // (1 if precision == "32-true" else 2)
    small = str(store("UNet2DConditionModel", form))
    setup = _SETUP.format(precision=precision, low=low_cpu_mem_usage, safe=form == "safetensors", small=small)
    assert_peak_memory_below(kept + 16 * MIB, f"model = load({str(folder)!r})", setup)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    stored: dict[str, Path] = {}

    def folder(form: str) -> Path:
        if form not in stored:
            stored[form] = tmp_path_factory.mktemp("large")
            config = {**UNET, "block_out_channels": (256, 384), "cross_attention_dim": 512, "norm_num_groups": 32}
            UNet2DConditionModel(**config).save_pretrained(stored[form], **FORMS[form])
        return stored[form]

    return folder
