"""What cannot be right is an error that says what to do, before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf

from nucleate import Runtime
from nucleate.errors import CheckpointError, CheckpointKeyError, CheckpointNotFoundError, ConfigurationError
from nucleate_transformers import TransformersIntegration


def load(path: Path | str, empty_init: bool = True, **kwargs: Any) -> Any:
    runtime = Runtime(accelerator="cpu", strategy="single_device", plugins=[TransformersIntegration()])
    with runtime.init_module(empty_init=empty_init):
        return hf.AutoModelForCausalLM.from_pretrained(path, **kwargs)


@pytest.mark.parametrize("empty_init", [True, False])
@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ({"device_map": "auto"}, "Runtime\\(accelerator"),
        ({"device_map": {"": "cpu"}}, "Runtime\\(accelerator"),
        ({"max_memory": {0: "1GB"}}, "Runtime\\(accelerator"),
        ({"tp_plan": "auto"}, "does not split models.*Runtime\\(strategy='tp=2'"),
        ({"tp_size": 4}, "tp_size=4.*Runtime\\(strategy='tp=4'"),
        ({"distributed_config": {"tp_size": 2, "fsdp_size": 4}}, "Runtime\\(strategy='fsdp\\+tp=2'"),
        ({"device_mesh": "any"}, "Runtime\\(strategy='tp=2'\\)"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bnb-nf4"),
        ({"load_in_8bit": True}, "bnb-nf4"),
    ],
)
def test_arguments_that_say_what_the_runtime_says(
    option: dict[str, Any], advice: str, empty_init: bool, tmp_path: Path
) -> None:
    tiny.save("llama", tmp_path)
    with pytest.raises(ConfigurationError, match=advice):
        load(tmp_path, empty_init, **option)


def test_a_gguf_file_which_transformers_reads_whole() -> None:
    runtime = Runtime(accelerator="cpu", strategy="single_device", plugins=[TransformersIntegration()])
    with runtime.init_module(empty_init=True), pytest.raises(ConfigurationError, match=r"GGUF.*outside"):
        hf.LlamaForCausalLM.from_pretrained("anywhere", gguf_file="model.gguf")


def test_the_same_arguments_are_free_where_they_say_nothing(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    load(tmp_path, device_map=None, offload_buffers=False, low_cpu_mem_usage=True)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_a_quantized_checkpoint_is_not_taken_for_plain_weights(method: str, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    quantized = {"quant_method": method, "load_in_4bit": True, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps({**settings, "quantization_config": quantized}))
    with pytest.raises(ConfigurationError, match=f"quantized \\('{method}'"):
        load(tmp_path)


def test_a_folder_that_every_rank_wrote_a_part_of(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(ConfigurationError, match="has separate files of each rank"):
        load(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    tiny.config_of("llama").save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"no file named.*model.safetensors"):
        load(tmp_path)


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path, max_shard_size="40KB")
    first, *_ = sorted(tmp_path.glob("*.safetensors"))
    first.unlink()
    with pytest.raises(CheckpointNotFoundError, match=first.name):
        load(tmp_path)


def test_an_index_that_promises_more_than_its_files_hold(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.layers.9.mlp.weight"] = next(iter(listed["weight_map"].values()))
    index.write_text(json.dumps(listed))
    with pytest.raises(CheckpointKeyError, match=r"model.layers.9.mlp.weight"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_was_cut_short(name: str, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    if name.endswith(".bin"):
        torch.save(hf.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), tmp_path / name)
        (tmp_path / "model.safetensors").unlink()
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=name):
        load(tmp_path, dtype=torch.float32)


def test_transformers_is_as_it_was_after_an_error(tmp_path: Path) -> None:
    before = vars(hf.PreTrainedModel)["from_pretrained"]
    with pytest.raises(OSError, match="nothing_here"):
        load(tmp_path / "nothing_here")
    assert vars(hf.PreTrainedModel)["from_pretrained"] is before
