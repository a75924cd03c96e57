"""The 4-bit layer computes what bitsandbytes' layer computes, whatever was called before."""

from __future__ import annotations

import copy
import pickle

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nucleate.errors import ConfigurationError, UsageError
from nucleate_bitsandbytes.layers import FourBitWeight, Linear4bit
from nucleate_bitsandbytes.layers import linear4bit as module_under_test
from nucleate_bitsandbytes.layers.packing import can_pack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]
HAS_KERNEL = bnb.functional.has_avx512bf16()


def run(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y) * 0.5)
    return y.detach(), x.grad, None if layer.bias is None else layer.bias.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quant_type", "nested"), FORMATS)
def test_output_and_gradients_in_train_mode_are_those_of_bitsandbytes(pair4, quant_type, nested, dtype):
    ours, theirs = pair4(quant_type=quant_type, nested=nested)
    x = torch.randn(7, 128).to(dtype)
    for mine, other in zip(run(ours, x), run(theirs, x), strict=True):
        assert mine.dtype == other.dtype or mine.dtype == ours.bias.dtype
        assert torch.equal(mine, other.to(mine.dtype))


@pytest.mark.parametrize(("quant_type", "nested"), FORMATS)
def test_bfloat16_output_in_eval_mode_is_that_of_bitsandbytes(pair4, quant_type, nested):
    ours, theirs = (layer.eval() for layer in pair4(quant_type=quant_type, nested=nested))
    for rows in (1, 3, 40):
        x = torch.randn(rows, 128).bfloat16()
        with torch.no_grad():
            assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_not_computed_in_bfloat16_in_eval_mode(pair4, dtype):
    ours, theirs = pair4()
    x = torch.randn(5, 128).to(dtype)
    with torch.no_grad():
        expected = theirs.train()(x)
        assert torch.equal(ours.eval()(x), expected)
        assert torch.equal(ours.train()(x), expected)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("training", [True, False])
def test_all_blocksizes(pair4, blocksize, training):
    ours, theirs = (layer.train(training) for layer in pair4((4096, 32), blocksize=blocksize))
    x = torch.randn(3, 4096).bfloat16()
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("shape", [(128, 100), (100, 64), (63, 5), (1, 1), (2, 1), (65, 33)])
@pytest.mark.parametrize("nested", [False, True])
def test_shapes_that_no_kernel_likes_are_computed_in_both_modes(pair4, shape, nested):
    ours, theirs = pair4(shape, nested=nested)
    x = torch.randn(4, shape[0]).bfloat16()
    expected = theirs(x)
    assert torch.equal(ours(x), expected)
    with torch.no_grad():
        # bitsandbytes fails an assertion for some of these in eval mode.
        assert torch.equal(ours.eval()(x), expected)


@pytest.mark.parametrize("shape", [(128,), (1, 128), (2, 3, 128), (2, 3, 4, 128), (0, 128), (2, 0, 128)])
@pytest.mark.parametrize("training", [True, False])
def test_inputs_of_any_number_of_dimensions(pair4, shape, training):
    ours, _ = pair4()
    x = torch.randn(shape).bfloat16().requires_grad_(training)
    plain = nn.Linear(128, 96, dtype=torch.bfloat16)
    plain.weight.data, plain.bias.data = ours.dequantize(), ours.bias.data
    y, expected = ours.train(training)(x), plain(x)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.2)
    if training:
        gradients = torch.autograd.grad(y.sum(), (x, ours.bias))
        for mine, other in zip(gradients, torch.autograd.grad(expected.sum(), (x, plain.bias)), strict=True):
            torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)


def test_rows_that_do_not_follow_each_other_in_memory_are_read_as_they_are(pair4):
    ours, _ = pair4()
    ours.eval()
    x = torch.randn(128, 6).bfloat16().t()
    with torch.no_grad():
        assert torch.equal(ours(x), ours(x.contiguous()))


@pytest.mark.parametrize("nested", [False, True])
def test_nothing_that_was_called_before_changes_an_output_or_the_state(pair4, assert_same_state, nested):
    fresh, theirs = pair4(nested=nested)
    used, _ = pair4(nested=nested)
    x = torch.randn(4, 128).bfloat16()
    with torch.no_grad():
        trained, evaluated = fresh.train()(x), copy.deepcopy(fresh).eval()(x)
        held = used.state_dict()
        before = {name: tensor.clone() for name, tensor in held.items()}
        for _ in range(2):
            assert torch.equal(used.eval()(x), evaluated)
            assert torch.equal(used(x), evaluated)
            assert_same_state(used, theirs)
            assert torch.equal(used(x), evaluated)
            assert torch.equal(copy.deepcopy(used)(x), evaluated)
            assert torch.equal(copy.copy(used)(x), evaluated)
            assert torch.equal(pickle.loads(pickle.dumps(used))(x), evaluated)
            assert torch.equal(used.dequantize(), fresh.dequantize())
            assert torch.equal(used(x.float()), fresh(x.float()))
            assert torch.equal(used.train()(x), trained)
            assert torch.equal(used.eval()(x), evaluated)
    assert all(torch.equal(held[name], before[name]) for name in held)


def test_a_forward_in_eval_mode_between_forward_and_backward_changes_no_gradient(pair4):
    ours, _ = pair4()
    x = torch.randn(4, 128).bfloat16().requires_grad_()
    expected = torch.autograd.grad(ours(x).sum(), x)[0]
    loss = ours(x).sum()
    with torch.no_grad():
        ours.eval()(x.detach())
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.skipif(not HAS_KERNEL, reason="needs a CPU with AVX512-BF16")
def test_the_kernel_for_inference_is_used_and_codes_are_held_once(pair4, monkeypatch):
    ours, _ = pair4()
    calls = []
    real = module_under_test.packed_linear
    monkeypatch.setattr(module_under_test, "packed_linear", lambda *a: calls.append(a) or real(*a))
    x = torch.randn(1, 128).bfloat16()
    with torch.no_grad():
        ours.eval()(x)
    assert len(calls) == 1
    first = ours.weight.untyped_storage().data_ptr()
    with torch.inference_mode():
        ours(x)
    assert ours.weight.untyped_storage().data_ptr() == first
    assert sum(p.untyped_storage().nbytes() for p in (ours.weight,)) == 128 * 96 // 2
    ours(x.clone().requires_grad_())
    ours.train()(x)
    assert len(calls) == 2


def test_scales_written_in_place_count_at_once(pair4):
    ours, _ = pair4()
    ours.eval()
    x = torch.randn(2, 128).bfloat16()
    with torch.no_grad():
        before = ours(x) - ours.bias
        ours.absmax.mul_(2)
        after = ours(x) - ours.bias
    torch.testing.assert_close(after, before * 2, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_computes_in_its_dtype_as_bitsandbytes_does(pair4, training):
    ours, theirs = (layer.train(training) for layer in pair4(dtype=torch.float32, bias=training))
    x = torch.randn(4, 128)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = ours(x), theirs(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)


def test_a_compute_dtype_is_computed_in_and_the_input_s_is_returned(pair4):
    ours, theirs = pair4(compute_dtype=torch.bfloat16)
    x = torch.randn(4, 128)
    y = ours(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_no_input_changes_what_the_next_is_computed_in(pair4):
    ours, _ = pair4()
    x = torch.randn(4, 128)
    expected = ours(x)
    ours(x.half())
    ours(x.bfloat16())
    assert torch.equal(ours(x), expected)
    assert ours.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(pair4, reentrant):
    ours, _ = pair4()
    x = torch.randn(4, 128).bfloat16().requires_grad_()
    expected = torch.autograd.grad(ours(x).float().pow(2).sum(), (x, ours.bias))
    loss = checkpoint(ours, x, use_reentrant=reentrant).float().pow(2).sum()
    loss.backward()
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(ours.bias.grad, expected[1])


class Adapted(nn.Module):
    """A base layer and a product of two small matrices beside it, as adapters wrap layers."""

    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x.to(self.a.weight.dtype))).to(x.dtype)


@pytest.mark.parametrize(("quant_type", "nested"), FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_beside_quantized_layers_learn(pair4, quant_type, nested, dtype):
    torch.manual_seed(0)
    first, _ = pair4((32, 64), quant_type=quant_type, nested=nested, bias=False)
    last, _ = pair4((64, 32), quant_type=quant_type, nested=nested, bias=False, seed=1)
    model = nn.Sequential(Adapted(first), nn.Tanh(), Adapted(last))
    before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    x = torch.randn(64, 32).to(dtype)
    target = model(x).detach().float() + torch.randn(64, 32)
    losses = []
    for _ in range(40):
        loss = (model(x).float() - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_casts_reach_the_bias_and_nothing_else(pair4, nested, used):
    ours, _ = pair4(nested=nested)
    expected = {name: tensor.clone() for name, tensor in ours.state_dict().items() if name != "bias"}
    x = torch.randn(2, 128).bfloat16()
    if used:
        with torch.no_grad():
            ours.eval()(x)
    for cast in (ours.half, ours.double, lambda: ours.to(torch.float32), lambda: ours.type(torch.float16)):
        cast()
        state = ours.state_dict()
        assert all(state[name].dtype == t.dtype and torch.equal(state[name], t) for name, t in expected.items())
    assert ours.bias.dtype == torch.float16


def test_moving_to_meta_and_back_by_assignment_keeps_the_layer(pair4, assert_same_state):
    ours, theirs = pair4(nested=True)
    state = copy.deepcopy(ours.state_dict())
    with torch.no_grad():
        ours.eval()(torch.randn(1, 128).bfloat16())
    ours.to("meta")
    assert all(parameter.is_meta for parameter in ours.parameters())
    assert ours.weight.shape == (128 * 96 // 2, 1)
    ours.load_state_dict(state, assign=True)
    assert_same_state(ours, theirs)
    x = torch.randn(3, 128).bfloat16()
    assert torch.equal(ours.train()(x), theirs(x))


def test_the_statistics_are_those_that_bitsandbytes_functions_take(pair4):
    ours, theirs = pair4(nested=True)
    assert ours.quant_state == theirs.weight.quant_state
    weight = bnb.functional.dequantize_4bit(ours.weight, ours.quant_state)
    assert torch.equal(weight, ours.dequantize())
    assert torch.equal(weight, bnb.functional.dequantize_4bit(theirs.weight, theirs.weight.quant_state))


def test_torch_compile_gives_the_same_output(pair4):
    ours, _ = pair4()
    compiled = torch.compile(ours, backend="eager")
    x = torch.randn(4, 128).bfloat16()
    assert torch.equal(compiled(x), ours(x))
    with torch.no_grad():
        ours.eval()
        assert torch.equal(compiled(x), ours(x))


def test_repr_says_what_the_layer_is(pair4):
    ours, _ = pair4(nested=True, compute_dtype=torch.bfloat16)
    expected = "in_features=128, out_features=96, bias=True, nf4-dq, blocksize=64, compute_dtype=torch.bfloat16"
    assert repr(ours) == f"Linear4bit({expected})"


def test_inputs_that_kernels_would_misread_are_refused(pair4):
    ours, _ = pair4()
    with pytest.raises(UsageError, match=r"shape \(4, 96\).*128 input features"):
        ours(torch.randn(4, 96))
    with pytest.raises(UsageError, match=r"torch.float64.*compute_dtype"):
        ours(torch.randn(4, 128).double())
    with pytest.raises(UsageError, match=r"torch.int64"):
        ours(torch.ones(4, 128, dtype=torch.int64))
    with pytest.raises(UsageError, match="meta"):
        ours(torch.randn(4, 128, device="meta"))
    with pytest.raises(UsageError, match="cannot be initialized"):
        ours.reset_parameters()


def test_weights_that_are_none_are_refused():
    codes, absmax = torch.zeros(32, 1, dtype=torch.uint8), torch.zeros(1)
    good = {"codes": codes, "absmax": absmax, "quant_type": "nf4"}
    Linear4bit(8, 8, FourBitWeight(**good))
    for change, message in (
        ({"codes": codes[:5]}, r"weight is torch.uint8 \(5, 1\) instead of torch.uint8 \(32, 1\)"),
        ({"absmax": torch.zeros(2)}, r"absmax is torch.float32 \(2,\) instead"),
        ({"absmax": absmax.half()}, "absmax is torch.float16"),
        ({"quant_type": "int4"}, "'int4', not one of nf4, fp4"),
        ({"blocksize": 48}, "blocksize is 48"),
        ({"dtype": torch.float64}, "torch.float64"),
        ({"nested_absmax": torch.zeros(1)}, "belong together"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            Linear4bit(8, 8, FourBitWeight(**{**good, **change}))
    with pytest.raises(ConfigurationError, match=r"bias has the shape \(3,\)"):
        Linear4bit(8, 8, FourBitWeight(**good), torch.zeros(3))
    with pytest.raises(ConfigurationError, match="compute_dtype=torch.float64"):
        Linear4bit(8, 8, FourBitWeight(**good), compute_dtype=torch.float64)


def test_tied_weights_stay_tied_when_one_is_used(pair4):
    ours, _ = pair4(bias=False)
    again = Linear4bit(128, 96, ours.quantized)
    assert again.weight is ours.weight
    x = torch.randn(2, 128).bfloat16()
    with torch.no_grad():
        expected = ours.eval()(x)
        assert torch.equal(again.eval()(x), expected)
        assert torch.equal(again.train()(x), copy.deepcopy(ours).train()(x))
        assert torch.equal(ours(x), expected)
    assert again.weight is ours.weight


def test_can_pack_follows_the_shape():
    assert can_pack((96, 128), 64) == HAS_KERNEL
    assert not can_pack((100, 128), 64)
    assert not can_pack((96, 96), 64)
