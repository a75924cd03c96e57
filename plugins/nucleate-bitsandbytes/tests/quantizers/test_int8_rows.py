from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nucleate.errors import ConversionError
from nucleate_bitsandbytes.quantizers import Int8Rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="session")
def check(bnb, convert, assert_same_bits):
    """Compare with what bitsandbytes makes of the whole weight."""

    def check(weight: Tensor, maker=()) -> None:
        codes, scales = convert(Int8Rows(), weight, maker)
        theirs = bnb.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")
        assert_same_bits(scales, theirs.SCB)
        assert_same_bits(codes, theirs.CB)

    return check


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-4, 1e-6, 1e-12, 5e3])
@pytest.mark.parametrize("shape", [(301, 333), (3, 40000), (1, 1), (7, 1)])
def test_a_weight_has_the_bits_of_bitsandbytes(check, dtype, scale, shape, way) -> None:
    check((torch.randn(shape) * scale).to(dtype))


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 200)),
    dtype=st.sampled_from(DTYPES),
    exponents=st.sampled_from(((-30, 15), (-20, -5), (-26, -14), (-3, 0))),
    maker=st.lists(st.integers(1, 20), max_size=8),
    zeros=st.sampled_from((0.0, 0.9, 1.0)),
)
def test_any_values_in_any_pieces_have_the_bits_of_bitsandbytes(
    check, seed, shape, dtype, exponents, maker, zeros
) -> None:
    # Each row has its own magnitude, down to where float16 has only zeros, and so has each value.
    generator = torch.Generator().manual_seed(seed)
    low, high = exponents
    rows = torch.randint(low, high, (shape[0], 1), generator=generator)
    values = torch.randint(-12, 1, shape, generator=generator)
    weight = torch.empty(shape).uniform_(-2, 2, generator=generator) * torch.exp2((rows + values).float())
    weight = torch.where(torch.rand(shape, generator=generator) < zeros, -0.0, weight)
    check(weight.to(dtype), maker)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_between_two_codes_are_rounded_like_bitsandbytes(check, dtype) -> None:
    halves = torch.arange(-254, 255) / 2
    for largest in (127.0, 127.0 * 2**-8, 127.0 * 2**-20, 127.0 * 2**8, 0.7, 100.0):
        check((halves * (largest / 127)).to(dtype).unsqueeze(0))


@pytest.mark.parametrize("exponent", range(-19, -5))
def test_small_bfloat16_values_are_rounded_to_float16_first(check, exponent) -> None:
    # Less than 2**-17 they change, and a row whose largest is less than 2**-9 may notice.
    significands = torch.arange(128, 256) / 128
    weight = torch.cat([significands * 2.0**-power for power in range(12, 28)]).repeat(128, 1)
    weight[:, 0] = significands * 2.0**exponent
    check(weight.clamp(max=weight[:, :1]).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros_have_codes_of_zero(check, dtype) -> None:
    weight = torch.randn(9, 100).to(dtype)
    weight[2] = 0
    weight[3] = -0.0
    check(weight)
    check(torch.zeros(9, 100, dtype=dtype))


def test_a_weight_without_rows_has_no_codes(convert) -> None:
    codes, scales = convert(Int8Rows(), torch.empty(0, 5))
    assert (codes.shape, scales.shape) == ((0, 5), (0,))


def test_the_weight_is_not_written_to(convert) -> None:
    for dtype in DTYPES:
        weight = torch.randn(100, 65).to(dtype)
        before = weight.clone()
        convert(Int8Rows(), weight)
        assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(convert, dtype, value) -> None:
    weight = torch.randn(30, 50).to(dtype)
    weight[20, 5:7] = value
    kind = "NaN" if value != value else "infinite"
    with pytest.raises(ConversionError, match=rf"^2 {kind} of 1500 values \(the first is {value}, element 1005 "):
        convert(Int8Rows(), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_float16_cannot_hold_is_refused(check, convert, dtype) -> None:
    weight = torch.randn(3, 50).to(dtype)
    weight[1, 1] = 65000
    check(weight)
    weight[1, 1] = -66000
    with pytest.raises(ConversionError, match=r"^1 infinite of 150 values .*float16, up to 65504"):
        convert(Int8Rows(), weight)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (3, 0), ()])
def test_only_a_matrix_is_taken(shape) -> None:
    with pytest.raises(ConversionError, match=r"cannot be quantized to int8, only a matrix with columns can"):
        Int8Rows().layout(shape, torch.float32)


def test_a_dtype_that_bitsandbytes_does_not_take_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"float64 cannot be quantized to int8"):
        Int8Rows().layout((4, 4), torch.float64)
