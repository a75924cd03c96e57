"""Products with quantized weights, by bitsandbytes' operators, with gradients for everything that can train.

bitsandbytes' own autograd functions give wrong gradients or none for a bias if the input has one dimension, and for
weights if the input has three. They also save weights in a way that hides in-place changes. Where their gradients are
right, the functions here give the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nucleate_bitsandbytes.library import bitsandbytes

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


class Product4bit(torch.autograd.Function):
    """`input @ weight.T + bias` for a 4-bit weight, which is frozen."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, codes: Tensor, state: QuantState) -> Tensor:
        """Compute the product.

        Args:
            ctx: Torch's context.
            input: `(..., in_features)`, in the dtype to compute in.
            bias: `(out_features,)`, in the same dtype.
            codes: `((n + 1) // 2, 1)`. Not the parameter itself, whose memory may be exchanged before backward.
            state: The statistics.
        """
        scales = (state.state2.absmax,) if state.nested else (state.absmax,)
        nested = {}
        if state.nested:
            nested = {"absmax_8bit": state.absmax, "absmax_code": state.state2.code, "absmax_offset": state.offset}
        product: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
            input, codes, state.shape, *scales, state.blocksize, state.quant_type, bias=bias, **nested
        )
        ctx.save_for_backward(codes)
        ctx.state = state
        ctx.dtypes = input.dtype, None if bias is None else bias.dtype
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input and bias."""
        (gradient,) = gradients
        (codes,) = ctx.saved_tensors
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = gradient @ dequantized4bit(codes, ctx.state).to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0, dtype=ctx.dtypes[1])
        return of_input, of_bias, None, None


class Product8bit(torch.autograd.Function):
    """`input @ weight.T + bias` for an int8 weight."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        codes: Tensor,
        scales: Tensor,
        threshold: float | None,
    ) -> Tensor:
        """Compute the product.

        Args:
            ctx: Torch's context.
            input: `(rows, in_features)`.
            bias: `(out_features,)`.
            weight: The unquantized weight, if it needs a gradient.
            codes: int8 `(out_features, in_features)`.
            scales: float32 `(out_features,)`.
            threshold: Quantize the input too and multiply integers, except for columns with a magnitude of at least
                this (0: no exceptions). None dequantizes the weight and multiplies floating point numbers.
        """
        if threshold is None:
            product = torch.nn.functional.linear(input, dequantized8bit(codes, scales, input.dtype), bias)
        else:
            rows, row_scales, outliers = bitsandbytes().functional.int8_vectorwise_quant(
                input.to(torch.float16), threshold=threshold
            )
            if threshold > 0:
                product, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
                    input, rows, codes, row_scales, scales, outliers, bias
                )
            else:
                product = torch.ops.bitsandbytes.int8_scaled_mm.default(
                    rows, codes, row_scales, scales, bias=bias, dtype=input.dtype
                )
        ctx.save_for_backward(codes, scales, input if weight is not None else None)
        ctx.dtypes = input.dtype, None if bias is None else bias.dtype, None if weight is None else weight.dtype
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, bias and weight, as if quantization changed nothing."""
        (gradient,) = gradients
        codes, scales, values = ctx.saved_tensors
        dtype, bias_dtype, weight_dtype = ctx.dtypes
        of_input = of_bias = of_weight = None
        if ctx.needs_input_grad[0]:
            of_input = gradient.to(dtype) @ dequantized8bit(codes, scales, dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.sum(0, dtype=bias_dtype)
        if ctx.needs_input_grad[2]:
            of_weight = (values.t() @ gradient).t().to(weight_dtype)
        return of_input, of_bias, of_weight, None, None, None


def dequantized8bit(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight `(out_features, in_features)` from int8 codes and the scales of their rows."""
    return codes.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))


def dequantized4bit(codes: Tensor, state: QuantState) -> Tensor:
    """Return the weight from 4-bit codes, in the dtype that it was quantized from."""
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        codes, scales4bit(state), state.blocksize, state.quant_type, state.shape, state.dtype
    )
    return weight


def scales4bit(state: QuantState) -> Tensor:
    """Return the scale of each block, float32 `(num_blocks,)`, also if the scales are quantized."""
    if not state.nested:
        return state.absmax  # type: ignore[no-any-return]
    return bitsandbytes().functional.dequantize_blockwise(state.absmax, state.state2) + state.offset  # type: ignore[no-any-return]
