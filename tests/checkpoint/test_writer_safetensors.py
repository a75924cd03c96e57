"""What safetensors files and folders hold, read by safetensors' and Hugging Face's own code."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from nucleate.checkpoint import save
from nucleate.checkpoint.state.values import decode
from nucleate.cluster import Communicator
from nucleate.errors import CheckpointError
from tests.device import device, equal

pytestmark = pytest.mark.usefixtures("factories_on_device")

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
]


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.cpu().resolve_conj().contiguous().view(-1).view(torch.uint8).tolist()


def every_dtype() -> dict[str, torch.Tensor]:
    random = torch.randint(256, (4096,), dtype=torch.uint8, generator=torch.Generator(device()).manual_seed(0))
    state = {}
    for number, dtype in enumerate(DTYPES):
        # Every bit pattern, NaN and infinities among them; odd sizes, so that alignment has to be cared for.
        data = random if dtype is not torch.bool else random % 2
        numel = 3 + 2 * number
        state[str(dtype).removeprefix("torch.")] = data[: numel * dtype.itemsize].view(dtype)
    return state


@pytest.mark.parametrize("name", ["c.safetensors", "c"])
def test_every_dtype_is_kept_bit_for_bit(tmp_path: Path, solo: Communicator, name: str) -> None:
    state = every_dtype()
    save(tmp_path / name, state, solo, format="safetensors")
    found = load_file(tmp_path / name if name != "c" else tmp_path / "c" / "model.safetensors")
    assert {key: (tensor.dtype, bits(tensor)) for key, tensor in found.items()} == {
        key: (tensor.dtype, bits(tensor)) for key, tensor in state.items()
    }


def test_tensors_of_any_layout_are_kept(tmp_path: Path, solo: Communicator) -> None:
    base = torch.arange(24.0).view(2, 3, 4)
    state = {
        "transposed": base.permute(2, 0, 1),
        "strided": base[:, ::2, 1:],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 5),
        "conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(),
        "negative": torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "view": base.view(-1)[5:7],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    assert state["negative"].is_neg()
    save(tmp_path / "c.safetensors", state, solo)
    found = load_file(tmp_path / "c.safetensors")
    assert found.keys() == state.keys()
    for key, tensor in state.items():
        assert found[key].shape == tensor.shape
        assert equal(found[key], tensor), key


def test_large_tensors_are_copied_in_small_steps(
    tmp_path: Path, solo: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nucleate.checkpoint.writers.slabs.STAGING_BYTES", 64)
    state = {"t": torch.randn(3, 50, 7).transpose(0, 2), "row": torch.randn(1, 999), "c": torch.randn(100)}
    save(tmp_path / "c.safetensors", state, solo)
    found = load_file(tmp_path / "c.safetensors")
    assert all(equal(found[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("name", ["c.safetensors", "c"])
def test_a_dtype_that_safetensors_cannot_hold_is_refused_by_name_before_anything_is_written(
    tmp_path: Path, solo: Communicator, name: str
) -> None:
    state = {"fine": torch.ones(1), "deep": {"wide": torch.ones(2, dtype=torch.complex128)}}
    with pytest.raises(CheckpointError, match=r"no name for the dtype of deep\.wide \(torch\.complex128\)"):
        save(tmp_path / name, state, solo, format="safetensors")
    assert os.listdir(tmp_path) == []


def test_everything_but_tensors_is_in_the_metadata_of_a_single_file(tmp_path: Path, solo: Communicator) -> None:
    save(tmp_path / "c.safetensors", {"model": nn.Linear(1, 2), "step": 3, "config": {"lr": 0.1}}, solo)
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        metadata = file.metadata()
        assert sorted(file.keys()) == ["model.bias", "model.weight"]
    assert metadata["format"] == "pt"
    values = decode(torch.frombuffer(bytearray(base64.b64decode(metadata["nucleate"])), dtype=torch.uint8))
    assert values["skeleton"] == {"model": {"weight": None, "bias": None}, "step": 3, "config": {"lr": 0.1}}
    assert values["keys"] == {("model", "weight"): "model.weight", ("model", "bias"): "model.bias"}
    assert values["modules"] == [("model",)]


def test_values_that_are_too_large_for_a_header_are_refused(
    tmp_path: Path, solo: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nucleate.checkpoint.writers.safetensors._MAX_HEADER_BYTES", 5000)
    with pytest.raises(CheckpointError, match="Save to a folder instead"):
        save(tmp_path / "c.safetensors", {"text": "x" * 5000}, solo)
    assert os.listdir(tmp_path) == []
    save(tmp_path / "c", {"text": "x" * 5000}, solo, format="safetensors")


def test_a_folder_has_shards_of_the_size_and_an_index(tmp_path: Path, solo: Communicator) -> None:
    state = {f"t{number}": torch.full((100,), float(number)) for number in range(10)} | {"large": torch.ones(1000)}
    save(tmp_path / "c", state, solo, format="safetensors", max_shard_size="1KB")
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 8000
    assert index["weight_map"].keys() == state.keys()
    files = sorted(item.name for item in (tmp_path / "c").glob("model-*"))
    assert files == [f"model-{number:05}-of-00006.safetensors" for number in range(1, 7)]
    for key, name in index["weight_map"].items():
        assert equal(load_file(tmp_path / "c" / name)[key], state[key])
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "c" / name).values()) for name in files]
    assert sizes == [800] * 5 + [4000]
    values = load_file(tmp_path / "c" / "nucleate.values.safetensors")
    assert decode(values["nucleate.values"])["skeleton"] == dict.fromkeys(state)


def test_one_shard_has_no_index_and_a_new_save_leaves_no_old_shards(tmp_path: Path, solo: Communicator) -> None:
    state = {"a": torch.ones(100), "b": torch.ones(100)}
    save(tmp_path / "c", state, solo, format="safetensors", max_shard_size=400)
    assert len(list((tmp_path / "c").glob("model-*"))) == 2
    save(tmp_path / "c", state, solo, format="safetensors")
    assert sorted(os.listdir(tmp_path / "c")) == ["model.safetensors", "nucleate.json", "nucleate.values.safetensors"]


def test_tensors_are_aligned(tmp_path: Path, solo: Communicator) -> None:
    state = {"bytes": torch.ones(3, dtype=torch.uint8), "double": torch.ones(1, dtype=torch.float64)}
    save(tmp_path / "c.safetensors", state, solo)
    data = (tmp_path / "c.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 64 == 0
    header = json.loads(data[8 : 8 + length])
    assert header["double"]["data_offsets"][0] % 8 == 0


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )


@pytest.mark.parametrize("max_shard_size", ["5GB", 2000])
@pytest.mark.parametrize("config_first", [True, False])
def test_transformers_loads_what_is_saved(
    tmp_path: Path, solo: Communicator, max_shard_size: Any, config_first: bool
) -> None:
    from transformers import LlamaForCausalLM

    model = tiny_llama()
    if config_first:
        model.config.save_pretrained(tmp_path / "c")
    save(tmp_path / "c", model, solo, format="safetensors", max_shard_size=max_shard_size)
    if not config_first:
        model.config.save_pretrained(tmp_path / "c")
    other, report = LlamaForCausalLM.from_pretrained(tmp_path / "c", output_loading_info=True)
    assert not any(report.values()), report
    assert other.lm_head.weight is other.model.embed_tokens.weight
    for key, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor), key
    tokens = torch.arange(10)[None]
    assert torch.equal(other(tokens).logits, model.eval()(tokens).logits)
    # And again, over what Hugging Face put there.
    save(tmp_path / "c", model, solo, format="safetensors", max_shard_size=max_shard_size)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "c").config.hidden_size == 16
    assert os.listdir(tmp_path) == ["c"]


def test_files_of_others_are_taken_along(tmp_path: Path, solo: Communicator) -> None:
    folder = tmp_path / "c"
    save(folder, {"a": torch.zeros(1)}, solo, format="safetensors")
    (folder / "config.json").write_text("config")
    (tmp_path / "shared.txt").write_text("tokens")
    (folder / "tokenizer.txt").symlink_to("../shared.txt")
    save(folder, {"a": torch.ones(1)}, solo, format="safetensors")
    assert (folder / "config.json").read_text() == "config"
    assert (folder / "tokenizer.txt").is_symlink()
    assert (folder / "tokenizer.txt").read_text() == "tokens"
    assert load_file(folder / "model.safetensors")["a"] == 1
    assert sorted(os.listdir(tmp_path)) == ["c", "shared.txt"]


def test_files_of_others_are_copied_where_they_cannot_be_linked(
    tmp_path: Path, solo: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text("config")

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path / "c", {"a": torch.ones(1)}, solo, format="safetensors")
    assert (tmp_path / "c" / "config.json").read_text() == "config"


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "folder"])
def test_what_would_be_lost_or_mixed_up_is_refused(tmp_path: Path, solo: Communicator, name: str) -> None:
    if name == "folder":
        (tmp_path / "c" / name).mkdir(parents=True)
    else:
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / name).write_text("somebody's")
    with pytest.raises(CheckpointError, match=f"will not be overwritten: it holds {name}"):
        save(tmp_path / "c", {"a": torch.ones(1)}, solo, format="safetensors")
    assert os.listdir(tmp_path / "c") == [name]


def test_a_dcp_folder_replaces_a_safetensors_folder_and_the_other_way_round(tmp_path: Path, solo: Communicator) -> None:
    for format in ("safetensors", "dcp", "safetensors"):
        save(tmp_path / "c", {"a": torch.ones(1)}, solo, format=format)
        assert (tmp_path / "c" / ".metadata").exists() == (format == "dcp")
        assert (tmp_path / "c" / "model.safetensors").exists() == (format == "safetensors")
    (tmp_path / "c" / "config.json").write_text("config")
    with pytest.raises(CheckpointError, match=r"somebody put config\.json into it"):
        save(tmp_path / "c", {"a": torch.ones(1)}, solo, format="dcp")
