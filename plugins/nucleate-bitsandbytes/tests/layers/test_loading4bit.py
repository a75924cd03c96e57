"""A 4-bit layer takes every state dict that means something, and refuses the others before anything has changed."""

from __future__ import annotations

import copy
import json

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

FORMATS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]


def test_state_dicts_have_the_bytes_of_bitsandbytes(pair4, assert_same_state):
    for quant_type, nested in FORMATS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for blocksize in (64, 128):
                ours, theirs = pair4(quant_type=quant_type, nested=nested, dtype=dtype, blocksize=blocksize)
                assert_same_state(ours, theirs)
                assert_same_state(nn.Sequential(ours), nn.Sequential(theirs))


def test_a_state_dict_fits_into_a_safetensors_file(pair4, tmp_path):
    from safetensors.torch import load_file, save_file

    ours, _ = pair4(nested=True)
    other, _ = pair4(nested=True, seed=1)
    model, again = nn.Sequential(ours, other), nn.Sequential(*(pair4(nested=True, seed=seed)[0] for seed in (2, 3)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again[1].dequantize(), other.dequantize())


def test_bitsandbytes_loads_what_this_layer_saves(pair4):
    ours, theirs = pair4(nested=True)
    state = {name.removeprefix("weight."): t for name, t in ours.state_dict().items() if name.startswith("weight.")}
    weight = bnb.nn.Params4bit.from_prequantized(ours.state_dict()["weight"], state, device="cpu")
    assert weight.quant_state == theirs.weight.quant_state


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("quant_type", "nested"), FORMATS)
@pytest.mark.parametrize("format_here", [("nf4", False, 64), ("fp4", True, 128)])
def test_quantized_states_of_any_format_are_taken_over(
    pair4, assert_same_state, quant_type, nested, format_here, assign, used
):
    there = pair4(quant_type=quant_type, nested=nested, seed=1)
    x = torch.randn(3, 128).bfloat16()
    for source in there:
        quant_type, nested, blocksize = format_here
        here, _ = pair4(quant_type=quant_type, nested=nested, blocksize=blocksize, dtype=torch.float32)
        here.bias.data = here.bias.data.bfloat16()
        if used:
            with torch.no_grad():
                here.eval()(x)
        result = here.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        assert_same_state(here, there[1])
        assert torch.equal(here.train()(x), there[1].train()(x))
        assert not any(p.requires_grad for name, p in here.named_parameters() if name != "bias")


def test_memory_of_a_layer_of_the_same_format_is_kept(pair4):
    ours, other = pair4(nested=True)[0], pair4(nested=True, seed=1)[0]
    before = {name: (p, p.data_ptr()) for name, p in ours.named_parameters()}
    ours.load_state_dict(other.state_dict())
    assert {name: (p, p.data_ptr()) for name, p in ours.named_parameters()} == before
    assert torch.equal(ours.nested_offset, other.nested_offset)
    assert ours.nested_offset.data_ptr() != other.nested_offset.data_ptr()


def test_codes_stored_as_another_dtype_are_taken_as_bytes(pair4, assert_same_state):
    ours, theirs = pair4()
    state = copy.deepcopy(ours.state_dict())
    state["weight"] = state["weight"].reshape(-1).view(torch.bfloat16).unsqueeze(1)
    other, _ = pair4(seed=1)
    other.load_state_dict(state)
    assert_same_state(other, theirs)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("quant_type", "nested"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_full_weight_is_quantized_into_place(pair4, assert_same_state, quant_type, nested, dtype, assign, used):
    ours, _ = pair4(quant_type=quant_type, nested=nested, seed=1)
    _, expected = pair4(quant_type=quant_type, nested=nested, dtype=dtype)
    if used:
        with torch.no_grad():
            ours.eval()(torch.randn(3, 128).bfloat16())
    generator = torch.Generator().manual_seed(0)
    state = {"weight": torch.randn(96, 128, generator=generator).to(dtype), "bias": expected.bias.data}
    result = nn.ModuleDict({"a": ours}).load_state_dict({f"a.{k}": v for k, v in state.items()}, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    if not assign:
        expected.bias.data = expected.bias.data.to(ours.bias.dtype)
    assert_same_state(ours, expected)


def changed(state, **changes):
    state = dict(state)
    for name, change in changes.items():
        key = {"json": "weight.quant_state.bitsandbytes__nf4"}.get(name, name.replace("__", "."))
        if change is None:
            del state[key]
        elif name == "json":
            values = {**json.loads(bytes(state[key].tolist())), **change}
            state[key] = torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)
        else:
            state[key] = change
    return state


BAD = [
    ({"weight__absmax": None}, "lack absmax"),
    ({"weight__quant_map": None}, "lack quant_map"),
    ({"json": None}, "one weight.quant_state.bitsandbytes__nf4 or __fp4"),
    ({"weight": None}, "no codes"),
    (
        {"weight__absmax": torch.zeros(192).half()},
        r"absmax is torch.float16 \(192,\) instead of torch.float32 \(192,\)",
    ),
    ({"weight__absmax": torch.zeros(2, 96)}, r"absmax is torch.float32 \(2, 96\)"),
    ({"weight__quant_map": torch.zeros(16)}, "quant_map holds other values"),
    ({"weight__nested_absmax": torch.zeros(1)}, "lack nested_quant_map"),
    ({"weight": torch.zeros(6000, 1, dtype=torch.uint8)}, r"weight is torch.uint8 \(6000, 1\)"),
    ({"json": {"shape": [64, 192]}}, r"quantized from the shape \(64, 192\), but the layer has \(96, 128\)"),
    ({"json": {"quant_type": "fp4"}}, "says that quant_type is 'fp4'"),
    ({"json": {"blocksize": 63}}, "blocksize is 63"),
    ({"json": {"dtype": "int8"}}, "quantized from torch.int8"),
    ({"json": {"dtype": "os"}}, "cannot be read"),
    ({"weight__quant_state__bitsandbytes__nf4": torch.zeros(3)}, "not bytes"),
    ({"weight": "text"}, "it is a str"),
    ({"bias": torch.zeros(5)}, r"bias is \(5,\) there and \(96,\) here"),
]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_a_damaged_quantized_state_is_refused_by_name_and_changes_nothing(pair4, change, message, strict):
    ours = nn.Sequential(pair4(seed=1)[0])
    before = copy.deepcopy(ours.state_dict())
    change = {name.replace("quant_state__bitsandbytes", "quant_state.bitsandbytes"): v for name, v in change.items()}
    change = {("weight.quant_state.bitsandbytes__nf4" if "quant_state" in k else k): v for k, v in change.items()}
    state = copy.deepcopy(pair4()[0].state_dict())
    direct = {k: v for k, v in change.items() if "." in k}
    state = {**changed(state, **{k: v for k, v in change.items() if "." not in k}), **direct}
    with pytest.raises(RuntimeError, match=message) as caught:
        ours.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()}, strict=strict)
    assert "0.weight cannot be loaded into a 4-bit layer" in str(caught.value)
    after = ours.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(6144, 1, dtype=torch.uint8), "codes of a quantized weight, without the statistics"),
        (torch.zeros(96, 128, dtype=torch.uint8), r"is torch.uint8 \(96, 128\), without the statistics"),
        (torch.zeros(128, 96), r"shape \(128, 96\) there and \(96, 128\) here"),
        (torch.full((96, 128), torch.nan), "(?i)nan"),
        (torch.full((96, 128), torch.inf), "(?i)inf|finite"),
        (torch.zeros(96, 128, dtype=torch.float64), "float64"),
        (torch.zeros(96, 128, device="meta"), "without values"),
    ],
)
def test_what_is_no_weight_is_refused_by_name_and_changes_nothing(pair4, weight, message, strict):
    ours = nn.Sequential(pair4(seed=1)[0])
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(RuntimeError, match=message) as caught:
        ours.load_state_dict({"0.weight": weight, "0.bias": torch.ones(96)}, strict=strict)
    assert "0.weight cannot be loaded" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_missing_and_unexpected_keys_are_told_as_torch_tells_them(pair4):
    ours = nn.Sequential(pair4()[0])
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*0.weight"):
        ours.load_state_dict({"0.bias": torch.zeros(96)})
    result = ours.load_state_dict({"0.bias": torch.zeros(96), "0.absmax": torch.zeros(1)}, strict=False)
    assert result.missing_keys == ["0.weight"]
    assert result.unexpected_keys == ["0.absmax"]
    assert torch.equal(ours.state_dict()["0.weight"], before["0.weight"])
    assert ours[0].bias.abs().sum() == 0
