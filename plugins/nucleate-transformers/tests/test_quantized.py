"""Models of transformers quantized by nucleate-bitsandbytes while they are read: the codes transformers would make."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import minilm
import pytest
import torch
import transformers as hf

from nucleate import Runtime
from nucleate.errors import CheckpointError, ConfigurationError
from nucleate_transformers import save_pretrained

#: A precision, what transformers calls it, and how near its embeddings stay to those in full.
PRECISIONS: dict[str, tuple[dict[str, Any], float]] = {
    "bnb-int8": ({"load_in_8bit": True}, 0.99),
    "bnb-nf4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 0.9),
    "bnb-nf4-dq": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        0.9,
    ),
}


def load(precision: str) -> Any:
    runtime = Runtime(accelerator="cpu", precision=precision)
    with runtime.init_module(empty_init=True):
        model = hf.AutoModel.from_pretrained(minilm.folder())
    return runtime.setup(model).eval()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_trained_model_is_quantized_as_transformers_does_it(precision: str) -> None:
    arguments, nearness = PRECISIONS[precision]
    config = hf.BitsAndBytesConfig(**arguments, bnb_4bit_compute_dtype=torch.bfloat16)
    theirs = hf.AutoModel.from_pretrained(
        minilm.folder(), quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    ours = load(precision)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    mine = minilm.embed(ours)
    assert torch.equal(mine, minilm.embed(theirs.eval()))
    assert (mine * minilm.reference(torch.float32)).sum(1).min() > nearness
    # It is still a trained model.
    assert mine[0] @ mine[1] > 0.4 > mine[0] @ mine[2] + 0.1


def test_ranks_that_share_a_quantized_model_make_the_embeddings_of_one_process(tmp_path: Path) -> None:
    for precision in PRECISIONS:
        torch.save(minilm.embed(load(precision)), tmp_path / f"{precision}.pt")
    script = Path(__file__).parent / "scripts" / "quantized.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), "fsdp", str(tmp_path), *PRECISIONS],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for precision in PRECISIONS:
        assert done.stdout.count(f"{precision} exact") == 2


@pytest.fixture(scope="module", params=PRECISIONS)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A folder that transformers quantized and saved, the precision that it has, and transformers' own model of it."""
    arguments, _ = PRECISIONS[request.param]
    folder = tmp_path_factory.mktemp("quantized")
    torch.manual_seed(0)
    hf.LlamaForCausalLM(LLAMA).save_pretrained(folder / "full")
    config = hf.BitsAndBytesConfig(
        **arguments, bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head", "o_proj"]
    )
    model = hf.AutoModelForCausalLM.from_pretrained(
        folder / "full", quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(folder / "quantized")
    again = hf.AutoModelForCausalLM.from_pretrained(folder / "quantized", dtype=torch.bfloat16, device_map="cpu")
    return request.param, folder / "quantized", again


LLAMA = hf.LlamaConfig(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def assert_same_state(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        if "quant_state" not in name:  # Text, whose dtype is said in other words.
            assert state[name].dtype == tensor.dtype, name
            assert torch.equal(state[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def test_what_transformers_quantized_and_saved_is_bound_as_it_is(quantized: tuple[str, Path, Any]) -> None:
    precision, folder, theirs = quantized
    runtime = Runtime(accelerator="cpu", precision=precision)
    with runtime.init_module(empty_init=True):
        model, info = hf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    model = runtime.setup(model)
    # Also what its quantizer left alone stays in full.
    assert_same_state(model.state_dict(), theirs.state_dict())
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(model.train()(tokens).logits, theirs.train()(tokens).logits.float())


def test_the_base_of_a_quantized_model_is_found_in_its_checkpoint(quantized: tuple[str, Path, Any]) -> None:
    precision, folder, theirs = quantized
    runtime = Runtime(accelerator="cpu", precision=precision)
    with runtime.init_module(empty_init=True):
        model = hf.AutoModel.from_pretrained(folder)
    assert_same_state(runtime.setup(model).state_dict(), theirs.model.state_dict())


@pytest.mark.parametrize("precision", ["bf16-true", "bnb-fp4"])
def test_a_quantized_checkpoint_is_refused_where_the_precision_has_no_layers_for_it(
    quantized: tuple[str, Path, Any], precision: str
) -> None:
    _, folder, _ = quantized
    runtime = Runtime(accelerator="cpu", precision=precision)
    with (
        pytest.raises((ConfigurationError, CheckpointError), match=r"bnb-(nf4|int8)"),
        runtime.init_module(empty_init=True),
    ):
        hf.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_quantized_here_and_saved_is_read_by_both(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(0)
    hf.LlamaForCausalLM(LLAMA).save_pretrained(tmp_path / "full")
    runtime = Runtime(accelerator="cpu", precision=precision)
    with runtime.init_module(empty_init=True):
        model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    model = runtime.setup(model)
    save_pretrained(runtime, tmp_path / "quantized", model)
    with runtime.init_module(empty_init=True):
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert_same_state(runtime.setup(again).state_dict(), dict(model.state_dict()))
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.bfloat16, device_map="cpu")
    assert_same_state(theirs.state_dict(), dict(model.state_dict()))
