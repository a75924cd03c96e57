"""litgpt's GPT: a checkpoint of `lazy_load` stays lazy, and files of older versions are loaded before `setup`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nucleate import Runtime
from nucleate.deferred import record_of

pytest.importorskip("litgpt", reason="litgpt is not installed; it goes without its dependencies: see noxfile.py")

from lightning.fabric.utilities.load import _lazy_load, _NotYetLoadedTensor
from litgpt import GPT, Config

PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["pythia-14m", "Llama-3-8B"])
def test_parameters_stay_deferred_and_get_the_files_values(
    tmp_path: Path, name: str, precision: str, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "padded_vocab_size": 128, "block_size": 32}
    config = Config.from_name(name, **sizes, n_query_groups=4, intermediate_size=96, head_size=16)
    torch.manual_seed(6)
    expected = GPT(config)
    torch.save(expected.state_dict(), tmp_path / "lit_model.pth")
    monkeypatch.setattr(_NotYetLoadedTensor, "_load_tensor", lambda self: pytest.fail("it was read by its library"))
    checkpoint = _lazy_load(tmp_path / "lit_model.pth")
    runtime = Runtime(accelerator="cpu", strategy="single_device", precision=precision)
    with runtime.init_module(empty_init=True):
        model = GPT(config)
        model.load_state_dict(_lazy_load(tmp_path / "lit_model.pth") if inside else checkpoint)
    assert [key for key, value in model.named_parameters() if record_of(value) is None] == []
    made = runtime.setup(model).module
    for key, value in expected.named_parameters():
        assert torch.equal(made.get_parameter(key), value.to(PRECISIONS[precision])), key
    for key, value in expected.named_buffers():
        assert torch.equal(made.get_buffer(key), value), key


def older(state: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    """Return a state dict as versions before 0.5 wrote it: query, key and value of a group stood together."""
    found = {}
    groups, size = config.n_query_groups, config.head_size
    for name, value in state.items():
        if ".attn.qkv." in name:
            parts = value.split([config.n_head * size, groups * size, groups * size])
            each = zip(*(part.chunk(groups) for part in parts), strict=True)
            found[name.replace("attn.qkv", "attn.attn")] = torch.cat([part for group in each for part in group])
        else:
            found[name] = value
    return found


@pytest.mark.parametrize("way", ["load_raw before setup", "load_raw after setup", "load_state_dict"])
@pytest.mark.parametrize("version", ["older", "current"])
@pytest.mark.parametrize("groups", [4, 2])
def test_files_of_every_version_are_loaded(tmp_path: Path, groups: int, version: str, way: str) -> None:
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "padded_vocab_size": 128, "block_size": 32}
    config = Config.from_name("Llama-3-8B", **sizes, n_query_groups=groups, intermediate_size=96, head_size=16)
    torch.manual_seed(6)
    expected = GPT(config)
    state = older(expected.state_dict(), config) if version == "older" else expected.state_dict()
    torch.save(state, tmp_path / "lit_model.pth")
    runtime = Runtime(accelerator="cpu", strategy="single_device", precision="32-true")
    with runtime.init_module(empty_init=True):
        model = GPT(config)
    if way == "load_state_dict":
        model.load_state_dict(torch.load(tmp_path / "lit_model.pth", mmap=True))
        model = runtime.setup(model)
    else:
        model = runtime.setup(model) if "after" in way else model
        assert runtime.load_raw(tmp_path / "lit_model.pth", model).is_exact
        model = model if "after" in way else runtime.setup(model)
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(model(tokens), expected(tokens))


@pytest.mark.parametrize("mode", ["bnb-int8", "bnb-nf4"])
def test_files_of_every_version_are_quantized_while_they_are_read(tmp_path: Path, mode: str) -> None:
    pytest.importorskip("nucleate_bitsandbytes", reason="the plugin nucleate-bitsandbytes is not installed")
    sizes = {"n_layer": 2, "n_embd": 256, "n_head": 4, "padded_vocab_size": 128, "block_size": 32}
    config = Config.from_name("Llama-3-8B", **sizes, n_query_groups=2, intermediate_size=512, head_size=64)
    torch.manual_seed(6)
    expected = GPT(config)
    tokens, outputs = torch.arange(12).view(2, 6), []
    for state in (older(expected.state_dict(), config), expected.state_dict()):
        torch.save(state, tmp_path / "lit_model.pth")
        runtime = Runtime(accelerator="cpu", precision=mode)
        with runtime.init_module(empty_init=True):
            model = GPT(config).requires_grad_(False)
        assert runtime.load_raw(tmp_path / "lit_model.pth", model).is_exact
        model = runtime.setup(model)
        assert not model.module.transformer.h[0].attn.qkv.state_dict()["weight"].is_floating_point()
        outputs.append(model(tokens).float())
    assert torch.equal(*outputs)
    assert torch.cosine_similarity(outputs[0].flatten(), expected(tokens).flatten(), 0) > 0.99
