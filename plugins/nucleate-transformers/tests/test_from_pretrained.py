"""What `from_pretrained` gives inside `init_module` is what it gives without us."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from nucleate import Runtime
from nucleate.checkpoint.stored import data_file
from nucleate.deferred import handle_of
from nucleate_transformers import TransformersIntegration


def runtime_of(precision: str | None = "32-true") -> Runtime:
    return Runtime(
        accelerator="cpu", strategy="single_device", devices=1, precision=precision, plugins=[TransformersIntegration()]
    )


def load(cls: Any, *args: Any, precision: str | None = "32-true", empty_init: bool | None = True, **kwargs: Any) -> Any:
    """Load inside `init_module` and set up."""
    runtime = runtime_of(precision)
    torch.manual_seed(7)
    with runtime.init_module(empty_init=empty_init):
        model = cls.from_pretrained(*args, **kwargs)
    return runtime.setup(model).eval()


def reference(cls: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return cls.from_pretrained(*args, **{"dtype": torch.float32, **kwargs})


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many bytes were read of tensors, by call."""
    sizes: list[int] = []
    plain = data_file.DataFile.read_into

    def count(self: data_file.DataFile, address: int, size_bytes: int, offset: int) -> None:
        sizes.append(size_bytes)
        plain(self, address, size_bytes, offset)

    monkeypatch.setattr(data_file.DataFile, "read_into", count)
    return iter([sizes])


@pytest.mark.parametrize("name", tiny.CLASSES)
def test_values_buffers_ties_and_outputs_are_equal(name: str, tmp_path: Path) -> None:
    tiny.save(name, tmp_path)
    cls = tiny.CLASSES[name]
    for precision, dtype in (("32-true", torch.float32), ("bf16-true", torch.bfloat16)):
        expected = reference(cls, tmp_path, dtype=dtype)
        after = torch.rand(3)
        model = load(cls, tmp_path, precision=precision)
        assert torch.equal(torch.rand(3), after)  # the random stream, too, stands where it would
        tiny.assert_same(model, expected)
        assert torch.equal(tiny.outputs_of(model, name), tiny.outputs_of(expected, name).float())


@pytest.mark.parametrize("empty_init", [None, False])
def test_what_is_not_deferred_is_equal_as_well(empty_init: bool | None, tmp_path: Path) -> None:
    tiny.save("mixtral", tmp_path)
    model = load(hf.AutoModelForCausalLM, tmp_path, empty_init=empty_init)
    tiny.assert_same(model, reference(hf.AutoModelForCausalLM, tmp_path))


def test_nothing_is_read_before_setup_and_then_everything_once(tmp_path: Path, read: Iterator[list[int]]) -> None:
    tiny.save("qwen2-moe", tmp_path, max_shard_size="40KB")
    sizes = next(read)
    runtime = runtime_of("bf16-true")
    with runtime.init_module(empty_init=True):
        model = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(handle_of(parameter) is not None for parameter in model.parameters())
    assert sizes == []
    runtime.setup(model)
    stored = [tensor for file in tmp_path.glob("*.safetensors") for tensor in load_file(file).values()]
    assert sum(sizes) == sum(tensor.nbytes for tensor in stored)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3


def as_torch_file(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    # As the files of old: tied weights have both names.
    tied = {"lm_head.weight": state["model.embed_tokens.weight"]} if "lm_head.weight" not in state else {}
    torch.save({**state, **tied}, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def both_of_a_tie(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, path / "model.safetensors", {"format": "pt"})


def both_of_a_tie_that_is_none(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    save_file(state, path / "model.safetensors", {"format": "pt"})


def only_the_head_of_a_tie(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, path / "model.safetensors", {"format": "pt"})


def without_a_layer(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    kept = {key: value for key, value in state.items() if "layers.1.mlp" not in key and "norm" not in key}
    save_file(kept, path / "model.safetensors", {"format": "pt"})


def with_keys_that_nobody_wants(path: Path) -> None:
    state = {**load_file(path / "model.safetensors"), "model.layers.0.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**state, "stranger": torch.ones(4)}, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        as_torch_file,
        both_of_a_tie,
        both_of_a_tie_that_is_none,
        only_the_head_of_a_tie,
        without_a_layer,
        with_keys_that_nobody_wants,
    ],
)
def test_any_state_that_files_are_in_gives_what_it_gives_eagerly(change: Any, tmp_path: Path) -> None:
    tiny.save("llama-tied", tmp_path)
    change(tmp_path)
    expected, their_report = reference(hf.LlamaForCausalLM, tmp_path, output_loading_info=True)
    runtime = runtime_of()
    torch.manual_seed(7)
    with runtime.init_module(empty_init=True):
        model, report = hf.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report == their_report
    tiny.assert_same(runtime.setup(model), expected)


def test_the_names_of_old_checkpoints_are_known(tmp_path: Path) -> None:
    tiny.save("bert", tmp_path)
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in load_file(tmp_path / "model.safetensors").items()
    }
    assert any(key.endswith("gamma") for key in old)
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    tiny.assert_same(load(hf.BertForMaskedLM, tmp_path), reference(hf.BertForMaskedLM, tmp_path))


@pytest.mark.parametrize("cls", [hf.BertModel, hf.AutoModel, hf.BertForSequenceClassification, hf.BertLMHeadModel])
def test_a_part_of_a_checkpoint_goes_into_another_head_or_none(cls: Any, tmp_path: Path) -> None:
    tiny.save("bert", tmp_path)
    tiny.assert_same(load(cls, tmp_path), reference(cls, tmp_path))


def test_the_weights_of_a_base_go_into_a_model_with_a_head(tmp_path: Path) -> None:
    torch.manual_seed(2)
    hf.GPT2Model(tiny.config_of("gpt2")).save_pretrained(tmp_path)
    tiny.assert_same(load(hf.GPT2LMHeadModel, tmp_path), reference(hf.GPT2LMHeadModel, tmp_path))


def test_a_head_of_another_size_is_made_anew_if_that_is_asked_for(tmp_path: Path) -> None:
    tiny.save("bert-classifier", tmp_path)
    options = {"num_labels": 7, "ignore_mismatched_sizes": True}
    model = load(hf.AutoModelForSequenceClassification, tmp_path, **options)
    tiny.assert_same(model, reference(hf.AutoModelForSequenceClassification, tmp_path, **options))
    assert model.classifier.weight.shape == (7, 32)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(hf.AutoModelForSequenceClassification, tmp_path, num_labels=7)


def test_subfolder_and_variant_are_found(tmp_path: Path) -> None:
    tiny.save("gpt2", tmp_path / "inner", variant="fp16")
    options = {"subfolder": "inner", "variant": "fp16"}
    tiny.assert_same(
        load(hf.AutoModelForCausalLM, tmp_path, **options), reference(hf.AutoModelForCausalLM, tmp_path, **options)
    )


def test_a_state_dict_of_the_callers_is_taken() -> None:
    torch.manual_seed(3)
    given = hf.GPT2LMHeadModel(tiny.config_of("gpt2")).state_dict()
    options = {"config": tiny.config_of("gpt2"), "state_dict": given}
    tiny.assert_same(load(hf.GPT2LMHeadModel, None, **options), reference(hf.GPT2LMHeadModel, None, **options))


def test_the_precision_is_the_dtype_unless_another_one_is_named(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "dtype": "float16"}))
    exact = reference(hf.LlamaForCausalLM, tmp_path, dtype=torch.float32)
    rounded = reference(hf.LlamaForCausalLM, tmp_path, dtype=torch.float16).float()
    assert not torch.equal(exact.lm_head.weight, rounded.lm_head.weight)
    assert torch.equal(load(hf.LlamaForCausalLM, tmp_path).lm_head.weight, exact.lm_head.weight)
    for option in ({"dtype": "auto"}, {"torch_dtype": "auto"}, {"dtype": torch.float16}, {"torch_dtype": "float16"}):
        model = load(hf.LlamaForCausalLM, tmp_path, **option)
        assert model.lm_head.weight.dtype == torch.float32
        assert torch.equal(model.lm_head.weight, rounded.lm_head.weight)


@pytest.mark.parametrize("in_the_configuration", [True, False])
@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "bert", "t5"])
def test_without_a_precision_the_checkpoint_decides_as_it_does_without_us(
    name: str, in_the_configuration: bool, tmp_path: Path
) -> None:
    tiny.save(name, tmp_path / "float32")
    cls = tiny.CLASSES[name]
    cls.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    for dtype in ("float32", "bfloat16"):
        path = tmp_path / dtype
        if not in_the_configuration:
            settings = json.loads((path / "config.json").read_text())
            settings.pop("dtype", None)
            (path / "config.json").write_text(json.dumps(settings))
        torch.manual_seed(7)
        expected = cls.from_pretrained(path)
        model = load(cls, path, precision=None)
        assert model.dtype == expected.dtype == getattr(torch, dtype)
        tiny.assert_same(model, expected)
        assert torch.equal(tiny.outputs_of(model, name), tiny.outputs_of(expected, name))


def test_without_a_precision_a_dtype_that_is_named_decides(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    for option in ({"dtype": torch.float16}, {"torch_dtype": "float16"}):
        model = load(hf.LlamaForCausalLM, tmp_path, precision=None, **option)
        tiny.assert_same(model, hf.LlamaForCausalLM.from_pretrained(tmp_path, **option))


def test_two_models_may_be_made_in_one_block_and_one_inside_of_another(tmp_path: Path) -> None:
    tiny.save("bert", tmp_path)

    class Mine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = hf.AutoModel.from_pretrained(tmp_path)
            self.teacher = hf.AutoModel.from_pretrained(tmp_path, dtype="auto")
            self.head = torch.nn.Linear(32, 2)

    torch.manual_seed(7)
    expected = Mine()
    runtime = runtime_of()
    torch.manual_seed(7)
    with runtime.init_module(empty_init=True):
        model = Mine()
    model = runtime.setup(model)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
