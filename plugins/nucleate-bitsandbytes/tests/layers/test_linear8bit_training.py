"""The layer that trains with a weight rounded to eight bits computes what a fresh layer of bitsandbytes does."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from nucleate.errors import UsageError
from nucleate_bitsandbytes.layers import Linear8bitTraining

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(dtype=torch.float32, threshold=0.0):
    plain = nn.Linear(64, 48, dtype=dtype)
    theirs = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=True, threshold=threshold)
    theirs.weight.data, theirs.bias.data = plain.weight.data.clone(), plain.bias.data.clone()
    return Linear8bitTraining(64, 48, plain.weight, plain.bias, threshold=threshold), theirs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_output_and_gradients_are_those_of_bitsandbytes(dtype, training, threshold):
    ours, theirs = (layer.train(training) for layer in make(dtype, threshold))
    x = torch.randn(6, 64).to(dtype)
    results = []
    for layer in (ours, theirs):
        values = x.clone().requires_grad_(training)
        # In eval mode bitsandbytes has no kernel on the CPU for a weight that has a gradient.
        layer.requires_grad_(training)
        y = layer(values)
        if training:
            y.backward(torch.ones_like(y) * 0.5)
            results.append((y, values.grad, layer.weight.grad, layer.bias.grad))
        else:
            results.append((y,))
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


def test_inputs_of_three_dimensions_have_gradients():
    ours, _ = make()
    x = torch.randn(2, 3, 64)
    ours(x).sum().backward()
    three, ours.weight.grad = ours.weight.grad, None
    ours(x.view(6, 64)).sum().backward()
    assert torch.equal(three, ours.weight.grad)
    assert ours(torch.randn(0, 64)).shape == (0, 48)


def test_eval_rounds_the_weight_that_there_is_now():
    ours, _ = make()
    x = torch.randn(4, 64)
    ours(x).sum().backward()
    with torch.no_grad():
        ours.weight.mul_(2)
        y = ours.eval()(x)
    fresh = Linear8bitTraining(64, 48, ours.weight, ours.bias).eval()
    assert torch.equal(y, fresh(x))


def test_it_learns_and_its_state_is_that_of_a_plain_layer():
    torch.manual_seed(0)
    model = nn.Sequential(make()[0], nn.Tanh(), nn.Linear(48, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, target = torch.randn(64, 64), torch.randn(64, 8)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    plain = nn.Linear(64, 48)
    plain.load_state_dict(model[0].state_dict())
    again = copy.deepcopy(model[0])
    again.load_state_dict(plain.state_dict())
    assert torch.equal(again(x), model[0](x))
    assert "int8 training" in repr(again)


def test_inputs_of_another_width_are_refused():
    with pytest.raises(UsageError, match="64 input features"):
        make()[0](torch.randn(2, 48))
