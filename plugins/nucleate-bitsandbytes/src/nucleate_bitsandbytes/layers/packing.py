"""The order of 4-bit codes that bitsandbytes' AVX512-BF16 kernel reads, and the kernel.

In a state dict, and for every other kernel, the codes of a weight `(rows, columns)` follow each other by rows, two in
a byte: uint8 `(rows * columns / 2, 1)`. The kernel reads 32 rows at a time, column by column, and in a byte stand the
codes of row `r` and of row `r + 16`: uint8 `(rows, columns / 2)`. So the shape says which order codes have, and nothing
else has to.

Measured for a bf16 weight `(5632, 2048)` on one core: one token takes 0.25 ms by this kernel, 3 ms by dequantizing and
`F.linear`, 1.1 ms unquantized; packing takes 3 ms. Up to some 200 tokens the kernel is quicker; 2048 take it 1.3 times
as long. It is used for all, so that an output does not depend on how many tokens there are beside it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from nucleate_bitsandbytes.library import bitsandbytes

#: How many rows stand together, and how many of these blocks are packed at once: what stays in the cache.
_ROWS = 32
_BLOCKS = 8


def is_packed(codes: Tensor) -> bool:
    """Return whether codes have the kernel's order."""
    return codes.shape[-1] != 1


def can_pack(shape: tuple[int, int], blocksize: int) -> bool:
    """Return whether this machine has the kernel, and the kernel takes weights of that shape `(rows, columns)`."""
    return shape[0] % _ROWS == 0 and shape[1] % blocksize == 0 and _has_kernel()


@cache
def _has_kernel() -> bool:
    return bool(bitsandbytes().functional.has_avx512bf16())


def pack(codes: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return codes in the kernel's order, in memory of their own.

    Args:
        codes: `(rows * columns / 2, 1)`.
        shape: `(rows, columns)`.
    """
    rows, columns = shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=codes.device)
    source = codes.reshape(rows // _ROWS, _ROWS, columns // 2)
    # Two bytes at a time: the first has the codes of the even column, the second those of the odd one.
    target = packed.view(torch.int16).view(rows // _ROWS, columns // 2, _ROWS // 2)
    for start in range(0, rows // _ROWS, _BLOCKS):
        part = source[start : start + _BLOCKS]
        upper, lower = part[:, : _ROWS // 2].to(torch.int16), part[:, _ROWS // 2 :].to(torch.int16)
        both = (upper >> 4) | (lower & 0xF0) | ((upper & 0xF) << 8) | ((lower & 0xF) << 12)
        target[start : start + _BLOCKS] = both.transpose(1, 2)
    return packed


def unpack(packed: Tensor) -> Tensor:
    """Return packed codes `(rows, columns / 2)` in the order that they are saved in, `(rows * columns / 2, 1)`."""
    rows, half = packed.shape
    codes = torch.empty(rows * half, 1, dtype=torch.uint8, device=packed.device)
    target = codes.view(rows // _ROWS, _ROWS, half)
    source = packed.view(torch.int16).view(rows // _ROWS, half, _ROWS // 2)
    for start in range(0, rows // _ROWS, _BLOCKS):
        both = source[start : start + _BLOCKS].transpose(1, 2).contiguous()
        target[start : start + _BLOCKS, : _ROWS // 2] = ((both & 0xF) << 4) | ((both >> 8) & 0xF)
        target[start : start + _BLOCKS, _ROWS // 2 :] = (both & 0xF0) | ((both >> 12) & 0xF)
    return codes


def packed_scales(absmax: Tensor, rows: int) -> Tensor:
    """Return the scales as the kernel reads them, bfloat16 `(blocks per row, rows)`."""
    return absmax.view(rows, -1).t().to(torch.bfloat16).contiguous()


def packed_linear(
    values: Tensor, packed: Tensor, scales: Tensor, quant_map: Tensor, shape: tuple[int, int], blocksize: int
) -> Tensor:
    """Return `values @ weight.T` by the kernel.

    Args:
        values: bfloat16 `(..., columns)`.
        packed: `(rows, columns / 2)`.
        scales: From `packed_scales`.
        quant_map: The sixteen values of codes; the kernel tells nf4 from fp4 by them.
        shape: `(rows, columns)`.
        blocksize: How many elements share a scale.
    """
    # The kernel takes the distance of rows, and that the elements of one follow each other.
    product: Tensor = torch.ops.bitsandbytes.gemv_4bit.default(
        values.contiguous(), packed, shape, scales, quant_map, blocksize
    )
    return product
