from __future__ import annotations

import pytest
import torch

from nucleate.errors import ConfigurationError, ConversionError
from nucleate_bitsandbytes.quantizers import DoubleQuant, FourBit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 129), (640, 1000), (1024, 4096)])
def test_the_scales_of_a_weight_have_the_bits_of_bitsandbytes(
    bnb, convert, assert_same_bits, quant_type, dtype, shape
) -> None:
    weight = (torch.randn(shape) * torch.rand(shape[0], 1)).to(dtype)
    _, scales = convert(FourBit(quant_type), weight, (3, 1))
    codes, nested, offset = convert(DoubleQuant(), scales)
    _, state = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type=quant_type)
    assert_same_bits(codes, state.absmax)
    assert_same_bits(nested, state.state2.absmax)
    assert_same_bits(offset, state.offset)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_scales_that_are_all_the_same_have_the_bits_of_bitsandbytes(bnb, convert, assert_same_bits, value) -> None:
    weight = torch.full((100, 640), value)
    _, scales = convert(FourBit("nf4"), weight)
    codes, nested, offset = convert(DoubleQuant(), scales)
    _, state = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    assert_same_bits(codes, state.absmax)
    assert_same_bits(nested, state.state2.absmax)
    assert_same_bits(offset, state.offset)


def test_scales_whose_mean_overflows_are_refused(convert) -> None:
    with pytest.raises(ConversionError, match=r"the mean of the 9 scales is inf"):
        convert(DoubleQuant(), torch.full((9,), 3e38))


@pytest.mark.parametrize(("shape", "dtype"), [((4,), torch.float16), ((2, 2), torch.float32), ((0,), torch.float32)])
def test_only_a_vector_of_float32_is_taken(shape, dtype) -> None:
    with pytest.raises(ConversionError, match=r"scales must be a non-empty vector of float32"):
        DoubleQuant().layout(shape, dtype)


def test_a_blocksize_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"blocksize=0 must be at least 1"):
        DoubleQuant(0)
