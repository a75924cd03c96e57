"""The int8 layer computes, saves and loads what bitsandbytes' layer does."""

from __future__ import annotations

import copy
import pickle

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nucleate.errors import ConfigurationError, UsageError
from nucleate_bitsandbytes.layers import Linear8bit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_output_and_gradients_are_those_of_bitsandbytes(pair8, dtype, training, threshold):
    ours, theirs = (layer.train(training) for layer in pair8(dtype=dtype, threshold=threshold))
    results = []
    for layer in (ours, theirs):
        x = torch.randn(7, 128, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
        y = layer(x)
        y.backward(torch.ones_like(y) * 0.5)
        results.append((y.detach(), x.grad, layer.bias.grad))
    for mine, other in zip(*results, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


@pytest.mark.parametrize("shape", [(128,), (1, 128), (2, 3, 128), (2, 3, 4, 128), (0, 128), (2, 0, 128)])
@pytest.mark.parametrize("training", [True, False])
def test_inputs_of_any_number_of_dimensions(pair8, shape, training):
    ours, _ = pair8()
    x = torch.randn(shape).bfloat16().requires_grad_()
    plain = nn.Linear(128, 96, dtype=torch.bfloat16)
    plain.weight.data, plain.bias.data = ours.dequantize(torch.bfloat16), ours.bias.data
    y, expected = ours.train(training)(x), plain(x)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.5)
    gradients = torch.autograd.grad(y.sum(), (x, ours.bias))
    for mine, other in zip(gradients, torch.autograd.grad(expected.sum(), (x, plain.bias)), strict=True):
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)


def test_nothing_that_was_called_before_changes_an_output_or_the_state(pair8, assert_same_state):
    ours, theirs = pair8()
    x = torch.randn(4, 128).bfloat16()
    with torch.no_grad():
        trained, evaluated = ours.train()(x), ours.eval()(x)
        for _ in range(2):
            for again in (ours, copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))):
                assert torch.equal(again.eval()(x), evaluated)
                assert torch.equal(again.train()(x), trained)
            assert_same_state(ours, theirs)
            ours(x.float())
    assert_same_state(nn.Sequential(ours), nn.Sequential(theirs))


def test_activation_checkpointing_and_autocast(pair8):
    ours, _ = pair8()
    x = torch.randn(4, 128).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(x)
        assert torch.equal(y, ours(x.bfloat16()).float())
        y.sum().backward()
        expected, x.grad = x.grad, None
        checkpoint(ours, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, expected)


def test_casts_reach_the_bias_and_nothing_else(pair8):
    ours, _ = pair8()
    expected = {name: tensor.clone() for name, tensor in ours.state_dict().items() if name != "bias"}
    for cast in (ours.half, ours.double, lambda: ours.to(torch.float32), lambda: ours.type(torch.float16)):
        cast()
        state = ours.state_dict()
        assert all(state[name].dtype == t.dtype and torch.equal(state[name], t) for name, t in expected.items())
    assert ours.bias.dtype == torch.float16
    assert ours.to("meta").SCB.is_meta
    assert "int8, threshold=0.0" in repr(ours)


@pytest.mark.parametrize("assign", [False, True])
def test_states_of_both_are_loaded_again_also_after_a_forward(pair8, assert_same_state, assign):
    for source in pair8(seed=1):
        with torch.no_grad():
            source.eval()(torch.randn(2, 128).bfloat16())
        here, _ = pair8()
        with torch.no_grad():
            here.eval()(torch.randn(2, 128).bfloat16())
        here.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
        assert_same_state(here, pair8(seed=1)[1])
        assert not here.weight.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_full_weight_is_quantized_into_place(pair8, assert_same_state, dtype):
    here, _ = pair8(seed=1, dtype=dtype)
    _, expected = pair8(dtype=dtype)
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = here.load_state_dict({"weight": weight, "bias": expected.bias.data})
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same_state(here, expected)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SCB": None}, "without the scales"),
        ({"weight": None}, "no codes"),
        ({"SCB": torch.zeros(5)}, r"SCB is torch.float32 \(5,\) instead of torch.float32 \(96,\)"),
        ({"SCB": torch.zeros(96).half()}, "SCB is torch.float16"),
        ({"weight": torch.zeros(96, 128, dtype=torch.uint8)}, "torch.uint8"),
        ({"weight": torch.zeros(128, 96, dtype=torch.int8)}, r"\(128, 96\) there and \(96, 128\) here"),
        ({"weight": torch.zeros(96, 128)}, "belong to int8 codes"),
        ({"weight": torch.full((96, 128), torch.nan), "SCB": None}, "(?i)nan"),
        ({"weight": torch.full((96, 128), 1e6), "SCB": None}, "65504"),
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, "weight_format is"),
        ({"bias": torch.zeros(5)}, r"bias is \(5,\)"),
    ],
)
def test_a_damaged_state_is_refused_by_name_and_changes_nothing(pair8, change, message, strict):
    ours = nn.Sequential(pair8(seed=1)[0])
    before = copy.deepcopy(ours.state_dict())
    state = {**pair8()[0].state_dict(), **change}
    with pytest.raises(RuntimeError, match=message) as caught:
        ours.load_state_dict({f"0.{name}": t for name, t in state.items() if t is not None}, strict=strict)
    assert "0.weight cannot be loaded into an int8 layer" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_what_does_not_fit_the_layer_is_refused(pair8):
    ours, _ = pair8()
    with pytest.raises(UsageError, match="128 input features"):
        ours(torch.randn(4, 96))
    with pytest.raises(UsageError, match="cannot be initialized"):
        ours.reset_parameters()
    with pytest.raises(ConfigurationError, match=r"scales is torch.float32 \(5,\)"):
        Linear8bit(128, 96, ours.weight, torch.zeros(5))
    with pytest.raises(ConfigurationError, match="threshold=-1"):
        Linear8bit(128, 96, ours.weight, ours.SCB, threshold=-1.0)


def test_bitsandbytes_loads_what_this_layer_saves(pair8):
    ours, theirs = pair8()
    other = pair8(seed=1)[1]
    other.load_state_dict(ours.state_dict())
    x = torch.randn(3, 128).bfloat16()
    assert torch.equal(other(x), theirs(x))
    assert isinstance(other, bnb.nn.Linear8bitLt)
