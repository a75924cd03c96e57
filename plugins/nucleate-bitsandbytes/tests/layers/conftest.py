"""Layers in pairs: one of ours and one of bitsandbytes', quantized from the same weight by bitsandbytes."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb

from nucleate_bitsandbytes.layers import FourBitWeight, Linear4bit, Linear8bit

Pair = tuple[nn.Module, nn.Module]


def make_pair4(
    shape: tuple[int, int] = (128, 96),
    *,
    quant_type: str = "nf4",
    nested: bool = False,
    blocksize: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = True,
    compute_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Pair:
    in_features, out_features = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    offsets = torch.randn(out_features, generator=generator).to(dtype) if bias else None
    theirs = bnb.nn.Linear4bit(
        in_features,
        out_features,
        bias=bias,
        quant_type=quant_type,
        compress_statistics=nested,
        compute_dtype=compute_dtype,
    )
    theirs.weight = bnb.nn.Params4bit(
        weight.clone(),
        requires_grad=False,
        quant_type=quant_type,
        compress_statistics=nested,
        blocksize=blocksize,
        module=theirs,
    )
    if offsets is not None:
        theirs.bias = nn.Parameter(offsets.clone())
    theirs = theirs.to("cpu")
    codes, state = bnb.functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )
    described = FourBitWeight(
        codes=codes,
        absmax=state.absmax,
        quant_type=quant_type,
        blocksize=blocksize,
        dtype=dtype,
        nested_absmax=state.state2.absmax if nested else None,
        offset=state.offset if nested else None,
    )
    ours = Linear4bit(
        in_features,
        out_features,
        described,
        None if offsets is None else nn.Parameter(offsets.clone()),
        compute_dtype=compute_dtype,
    )
    return ours, theirs


def make_pair8(
    in_features: int = 128,
    out_features: int = 96,
    *,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = True,
    threshold: float = 0.0,
    seed: int = 0,
) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    offsets = torch.randn(out_features, generator=generator).to(dtype) if bias else None
    theirs = bnb.nn.Linear8bitLt(in_features, out_features, bias=bias, has_fp16_weights=False, threshold=threshold)
    theirs.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    if offsets is not None:
        theirs.bias = nn.Parameter(offsets.clone())
    theirs = theirs.to("cpu")
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    ours = Linear8bit(
        in_features,
        out_features,
        codes,
        scales,
        None if offsets is None else nn.Parameter(offsets.clone()),
        threshold=threshold,
    )
    return ours, theirs


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Each forward of bitsandbytes' int8 layers logs a warning; that is not what is tested here."""
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@pytest.fixture
def pair4() -> Callable[..., Pair]:
    """Return the maker of 4-bit pairs, ours first."""
    return make_pair4


@pytest.fixture
def pair8() -> Callable[..., Pair]:
    """Return the maker of int8 pairs, ours first."""
    return make_pair8


@pytest.fixture
def assert_same_state() -> Callable[[nn.Module, nn.Module], None]:
    """Return an assertion that two state dicts have the same keys in the same order, dtypes, shapes and bytes."""

    def check(one: nn.Module, other: nn.Module) -> None:
        left, right = one.state_dict(), other.state_dict()
        assert list(left) == list(right)
        for name in left:
            assert (left[name].dtype, left[name].shape) == (right[name].dtype, right[name].shape), name
            assert as_bytes(left[name]) == as_bytes(right[name]), name

    return check


def as_bytes(tensor: Tensor) -> list[int]:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).tolist()
