"""The maps between Hugging Face's Llama and litgpt's GPT: both models compute the same, whichever way weights go."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate.checkpoint import Rule, convert, open_checkpoint, verify
from tests.multi.ranks import ROOT, fork_ranks

pytest.importorskip("transformers")

SCRIPT = Path(__file__).parent / "key_maps_on_ranks.py"
# Heads of the queries, heads of the keys and values, and whether the output layer is the embedding.
SHAPES = [(4, 4, False), (8, 2, False), (4, 2, True), (4, 1, True)]

Map = Callable[..., list[Rule]]


def maps() -> Any:
    spec = importlib.util.spec_from_file_location("key_maps", ROOT / "examples" / "key_maps.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def llama(heads: int, groups: int, tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def gpt(heads: int, groups: int) -> nn.Module:
    from litgpt import GPT, Config

    config = Config(
        name="like the Llama",
        block_size=64,
        vocab_size=96,
        padded_vocab_size=96,
        n_layer=2,
        n_head=heads,
        n_query_groups=groups,
        n_embd=64,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-6,
        mlp_class_name="LLaMAMLP",
        intermediate_size=160,
        rope_base=10000,
    )
    return GPT(config).eval()


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(accelerator="cpu", strategy="single_device")


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    torch.manual_seed(0)
    model = llama(*request.param)
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.arange(40).view(2, 20) * 7 % 96
    with torch.no_grad():
        out = model(tokens)
    return getattr(out, "logits", out)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("folder", "shape"), [(shape, shape) for shape in SHAPES], indirect=["folder"])
@pytest.mark.parametrize("when", ["before setup", "after setup"])
def test_litgpt_computes_with_llamas_weights_what_llama_does(
    runtime: Runtime, folder: Path, shape: tuple[int, int, bool], when: str
) -> None:
    pytest.importorskip("litgpt")
    heads, groups, tied = shape
    torch.manual_seed(0)
    reference = llama(*shape)
    with runtime.init_module(empty_init=when == "before setup"):
        model = gpt(heads, groups)
    target = model if when == "before setup" else runtime.setup(model)
    report = runtime.load_raw(folder, target, keys=maps().llama_to_litgpt(heads, groups, tied=tied))
    assert report.is_exact
    if when == "before setup":
        runtime.setup(model)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("folder", "shape"), [(shape, shape) for shape in SHAPES], indirect=["folder"])
def test_llama_gets_back_from_litgpt_what_it_gave(
    runtime: Runtime, folder: Path, shape: tuple[int, int, bool], tmp_path: Path
) -> None:
    pytest.importorskip("litgpt")
    heads, groups, tied = shape
    model = gpt(heads, groups)
    runtime.load_raw(folder, model, keys=maps().llama_to_litgpt(heads, groups, tied=tied))
    # As litgpt writes it.
    torch.save(model.state_dict(), tmp_path / "lit_model.pth")
    with runtime.init_module(empty_init=True):
        back = llama(*shape)
    report = runtime.load_raw(tmp_path / "lit_model.pth", back, keys=maps().litgpt_to_llama(heads, groups, tied=tied))
    assert report.is_exact
    runtime.setup(back)
    assert torch.equal(logits(back), logits(llama_with(folder, shape)))


def llama_with(folder: Path, shape: tuple[int, int, bool]) -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("folder", "shape"), [(shape, shape) for shape in SHAPES[:2]], indirect=["folder"])
@pytest.mark.parametrize("legacy", [False, True])
def test_files_are_converted_there_and_back_bit_for_bit(
    folder: Path, shape: tuple[int, int, bool], legacy: bool, tmp_path: Path
) -> None:
    heads, groups, _ = shape
    convert(folder, tmp_path / "lit_model.pth", keys=maps().llama_to_litgpt(heads, groups, legacy=legacy))
    names = open_checkpoint(tmp_path / "lit_model.pth").tensors
    assert f"transformer.h.1.attn.{'attn' if legacy else 'qkv'}.weight" in names
    convert(
        tmp_path / "lit_model.pth",
        tmp_path / "back",
        format="safetensors",
        keys=maps().litgpt_to_llama(heads, groups, legacy=legacy),
    )
    assert verify(tmp_path / "back", against=folder).is_good


@pytest.mark.parametrize(("folder", "shape"), [(SHAPES[1], SHAPES[1])], indirect=["folder"])
def test_the_legacy_layout_is_what_litgpt_takes_apart(
    runtime: Runtime, folder: Path, shape: tuple[int, int, bool], tmp_path: Path
) -> None:
    """litgpt's GPT still reads queries, keys and values that lie side by side, under the name `attn.attn`."""
    pytest.importorskip("litgpt")
    heads, groups, _ = shape
    convert(folder, tmp_path / "old.pth", keys=maps().llama_to_litgpt(heads, groups, legacy=True))
    model = gpt(heads, groups)
    model.load_state_dict(torch.load(tmp_path / "old.pth", weights_only=True))
    torch.testing.assert_close(logits(model), logits(llama_with(folder, shape)), rtol=1e-5, atol=1e-5)


def test_the_frequencies_of_old_files_are_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = llama(4, 2, False).state_dict()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(state, tmp_path / "old.pth")
    report = convert(tmp_path / "old.pth", tmp_path / "new.pth", keys=maps().old_llama_to_litgpt(4, 2))
    assert report.num_tensors == 3 + 2 * 7


@pytest.mark.parametrize("folder", [SHAPES[1]], indirect=True)
def test_every_rank_reads_and_saves_its_own_part(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("litgpt")
    out = fork_ranks(SCRIPT, 2, folder, tmp_path / "saved", timeout=240).stdout
    assert out.splitlines().count("equal") == 2
    assert verify(tmp_path / "saved", against=folder).is_good
