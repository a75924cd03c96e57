from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nucleate.errors import ConfigurationError, ConversionError
from nucleate_bitsandbytes.quantizers import FourBit, kernels
from nucleate_bitsandbytes.quantizers.codebook import UNSURE, VALUES, codebook

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@pytest.fixture(scope="session")
def check(bnb, convert, assert_same_bits):
    """Compare with what bitsandbytes makes of the whole tensor."""

    def check(tensor: Tensor, quant_type: str, blocksize: int = 64, maker=()) -> None:
        codes, scales = convert(FourBit(quant_type, blocksize), tensor, maker)
        theirs, state = bnb.functional.quantize_4bit(tensor, blocksize=blocksize, quant_type=quant_type)
        assert_same_bits(scales, state.absmax)
        assert_same_bits(codes, theirs)

    return check


def of_bits(seed: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Return finite values whose bits are random: of all magnitudes, subnormal ones and zeros of both signs too."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.float32:
        values = torch.randint(-(2**31), 2**31, (numel,), generator=generator, dtype=torch.int32).view(dtype)
    else:
        values = torch.randint(-(2**15), 2**15, (numel,), generator=generator, dtype=torch.int16).view(dtype)
    return torch.where(values.isfinite(), values, 0)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-7, 1e3])
def test_a_weight_in_many_chunks_has_the_bits_of_bitsandbytes(check, quant_type, dtype, scale, way) -> None:
    # More than a chunk, and not a multiple of one, nor of a block, nor even.
    check((torch.randn(301, 333) * scale).to(dtype), quant_type)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_blocksize_has_the_bits_of_bitsandbytes(check, quant_type, blocksize) -> None:
    for dtype in DTYPES:
        check(torch.randn(4096 * 9 + 17).to(dtype), quant_type, blocksize, maker=(1, 2))


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**32 - 1),
    numel=st.integers(1, 3000),
    dtype=st.sampled_from(DTYPES),
    conversion=st.builds(FourBit, st.sampled_from(QUANT_TYPES), st.sampled_from((32, 64, 256))),
    maker=st.lists(st.integers(1, 20), max_size=8),
    spread=st.sampled_from((None, 0, 3, 8)),
    zeros=st.sampled_from((0.0, 0.5, 1.0)),
)
@example(seed=0, numel=1, dtype=torch.float32, conversion=FourBit("fp4"), maker=[], spread=None, zeros=1.0)
def test_any_values_in_any_pieces_have_the_bits_of_bitsandbytes(
    check, seed, numel, dtype, conversion, maker, spread, zeros
) -> None:
    values = of_bits(seed, numel, dtype)
    if spread is not None:
        # Magnitudes that have something to do with one another, and steps so coarse that many are ties.
        generator = torch.Generator().manual_seed(seed)
        values = (torch.randint(-24, 25, (numel,), generator=generator) / 24).to(dtype) * 2.0 ** -(seed % 4 * spread)
    values = torch.where(torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < zeros, -0.0, values)
    check(values.to(dtype), conversion.quant_type, conversion.blocksize, maker)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("exponent", [-126, -110, -97, -1, 0, 64, 126, 127])
def test_bfloat16_is_exact_for_every_pair_of_a_value_and_a_largest_one(check, quant_type, exponent) -> None:
    # A bin's code is looked up without comparing the value, so that it is right has to be seen for each.
    significands = torch.arange(128, 256).double() / 128
    values = torch.cat([significands * 2.0 ** (exponent - power) for power in range(12)])
    blocks = []
    for largest in (significands * 2.0**exponent).tolist():
        below = values[values <= largest]
        below = torch.cat([below, -below])
        below = torch.nn.functional.pad(below, (0, -below.numel() % 63))
        rows = below.view(-1, 63)
        blocks.append(torch.cat([torch.full((rows.shape[0], 1), largest, dtype=torch.double), rows], 1))
    check(torch.cat(blocks).bfloat16(), quant_type)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_subnormal_values_are_exact(check, quant_type, dtype) -> None:
    # Where bitsandbytes divides by 1e-38 instead of the largest value, and around it.
    steps = torch.arange(1, 300, dtype=torch.int32) * (1 << 16)
    values = steps.view(torch.float32)
    blocks = values.unsqueeze(1) * torch.linspace(-1, 1, 64)
    check(blocks.to(dtype), quant_type)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("power", [-120, -99, -10, 0, 10, 120])
def test_values_on_a_midpoint_and_beside_it_have_the_code_of_bitsandbytes(check, quant_type, power) -> None:
    midpoints = codebook(quant_type, torch.float32).midpoints
    beside = torch.cat(
        [midpoints, midpoints.nextafter(torch.tensor(2.0)), midpoints.nextafter(torch.tensor(-2.0)), torch.ones(1)]
    )
    block = torch.nn.functional.pad(beside, (0, 64 - beside.numel())) * 2.0**power
    check(torch.stack([block, -block, block.flip(0)]), quant_type)
    # Largest values that are no power of two round the inverse.
    check(torch.cat([block * scale for scale in (1.1, 1.5, 1.9999999)]), quant_type)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_of_both_signs_have_the_codes_of_bitsandbytes(check, quant_type, dtype) -> None:
    weight = torch.zeros(40, 65, dtype=dtype)
    check(weight, quant_type)
    weight[::3] = -0.0
    check(weight, quant_type)
    weight[5, 7] = 1
    check(weight, quant_type)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_the_largest_values_of_a_dtype_are_no_overflow(check, quant_type) -> None:
    for dtype in DTYPES:
        check((torch.randn(256).sign() * torch.finfo(dtype).max).to(dtype), quant_type)


def test_an_empty_tensor_has_no_codes(convert) -> None:
    codes, scales = convert(FourBit("nf4"), torch.empty(0, 5))
    assert (codes.shape, scales.shape) == ((0, 1), (0,))


def test_threads_that_convert_at_once_do_not_disturb_each_other(convert, assert_same_bits) -> None:
    weights = [torch.randn(512, 512).to(dtype) for dtype in DTYPES for _ in range(4)]
    alone = [convert(FourBit("nf4"), weight) for weight in weights]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda weight: convert(FourBit("nf4"), weight, (64,) * 64), weights))
    for ours, theirs in zip(together, alone, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert_same_bits(one, other)


def test_it_works_outside_of_inference_mode_after_it_worked_inside(convert, assert_same_bits) -> None:
    weight = torch.randn(64, 64)
    # In a new thread, whose memory is made in that mode.
    with ThreadPoolExecutor(1) as pool:

        def inside() -> list[Tensor]:
            with torch.inference_mode():
                return convert(FourBit("nf4"), weight)

        first = pool.submit(inside).result()
        second = pool.submit(convert, FourBit("nf4"), weight).result()
    assert_same_bits(first[0].clone(), second[0])


def test_the_weight_is_not_written_to(convert) -> None:
    for dtype in DTYPES:
        weight = torch.randn(100, 65).to(dtype)
        before = weight.clone()
        convert(FourBit("nf4"), weight)
        assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [3, 64 * 9 + 2], ids=["in a whole block", "in the rest"])
def test_a_nan_is_refused_and_counted(convert, dtype, at) -> None:
    weight = torch.randn(64 * 9 + 10).to(dtype)
    weight[at] = float("nan")
    with pytest.raises(ConversionError, match=r"^1 NaN of \d+ values \(the first is nan, element \d+ of the blocks"):
        convert(FourBit("nf4"), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_are_counted_apart_with_the_place_of_the_first(convert, dtype) -> None:
    weight = torch.randn(1000, 64).to(dtype)
    weight[10, 7] = float("-inf")
    weight[800, 1] = float("inf")
    weight[900, :3] = float("nan")
    with pytest.raises(ConversionError, match=r"^3 NaN and 2 infinite of 64000 values \(.* -inf, element 647 "):
        convert(FourBit("fp4"), weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.complex64])
def test_a_dtype_that_bitsandbytes_does_not_take_is_refused(dtype) -> None:
    with pytest.raises(ConversionError, match=r"cannot be quantized to nf4, only float32, bfloat16, float16 can"):
        FourBit("nf4").layout((4, 4), dtype)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"quant_type='nf5' is unknown. Give 'nf4' or 'fp4'"):
        FourBit("nf5")
    with pytest.raises(ConfigurationError, match=r"blocksize=100 must be one of 32, 64, "):
        FourBit("nf4", blocksize=100)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_the_values_and_their_order_are_those_of_bitsandbytes(bnb, quant_type) -> None:
    # Read in bitsandbytes 0.50.2, backends/default/ops.py.
    midpoints, order = bnb.backends.default.ops._get_4bit_quantize_bounds(quant_type, torch.device("cpu"))
    book = codebook(quant_type, torch.float32)
    values = bnb.functional.get_4bit_type(quant_type, device="cpu")
    assert torch.equal(torch.tensor(VALUES[quant_type]), values)
    assert torch.equal(book.midpoints, midpoints)
    assert book.codes.tolist() == order.tolist()


def test_bfloat16_needs_no_search_for_nf4() -> None:
    assert codebook("nf4", torch.bfloat16).is_sure
    assert not codebook("nf4", torch.float16).is_sure
    assert int((codebook("nf4", torch.float32).table >= UNSURE).sum()) < 20


def test_the_loops_are_torchscript_where_there_is_one() -> None:
    for kernel in (kernels.largest_of_rows, kernels.four_bit_codes, kernels.int8_codes):
        assert isinstance(kernels.without_lock(kernel), torch.jit.ScriptFunction)
