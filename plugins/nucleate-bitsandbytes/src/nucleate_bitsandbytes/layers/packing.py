"""The order of 4-bit codes that bitsandbytes' AVX512-BF16 kernel reads, and the kernel.

In a state dict, and for every other kernel, the codes of a weight `(rows, columns)` are ordered by rows, two in a byte:
uint8 `(rows * columns / 2, 1)`. This kernel reads 32 rows at a time, column by column. A byte holds the codes of row
`r` and row `r + 16`: uint8 `(rows, columns / 2)`. So the shape alone tells the order of the codes.

Measured for a bf16 weight `(5632, 2048)` on one core: one token takes 0.25 ms by this kernel, 3 ms by dequantizing and
`F.linear`, 1.1 ms unquantized; packing takes 3 ms. Up to about 200 tokens the kernel is faster; 2048 tokens take 1.3
times as long. The kernel is used for any number of tokens, so that an output does not depend on that number.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from nucleate_bitsandbytes.library import bitsandbytes

#: The number of rows in a block, and of blocks that are packed at once. So many blocks stay in the cache.
_ROWS = 32
_BLOCKS = 8


def is_packed(codes: Tensor) -> bool:
    """Return whether the codes are in the kernel's order."""
    return codes.shape[-1] != 1


def can_pack(shape: tuple[int, int], blocksize: int) -> bool:
    """Return whether this machine has the kernel, and the kernel supports weights of shape `(rows, columns)`."""
    return shape[0] % _ROWS == 0 and shape[1] % blocksize == 0 and _has_kernel()


@cache
def _has_kernel() -> bool:
    return bool(bitsandbytes().functional.has_avx512bf16())


def pack(codes: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the codes in the kernel's order, in new memory.

    Args:
        codes: `(rows * columns / 2, 1)`.
        shape: `(rows, columns)`.
    """
    rows, columns = shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=codes.device)
    source = codes.reshape(rows // _ROWS, _ROWS, columns // 2)
    # Two bytes at a time: the first has the codes of the even column, the second the codes of the odd column.
    target = packed.view(torch.int16).view(rows // _ROWS, columns // 2, _ROWS // 2)
    for start in range(0, rows // _ROWS, _BLOCKS):
        part = source[start : start + _BLOCKS]
        upper, lower = part[:, : _ROWS // 2].to(torch.int16), part[:, _ROWS // 2 :].to(torch.int16)
        both = (upper >> 4) | (lower & 0xF0) | ((upper & 0xF) << 8) | ((lower & 0xF) << 12)
        target[start : start + _BLOCKS] = both.transpose(1, 2)
    return packed


def unpack(packed: Tensor) -> Tensor:
    """Return packed codes `(rows, columns / 2)` in the saved order, `(rows * columns / 2, 1)`."""
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
    """Return the scales in the kernel's form, bfloat16 `(blocks per row, rows)`."""
    return absmax.view(rows, -1).t().to(torch.bfloat16).contiguous()


def packed_linear(
    values: Tensor, packed: Tensor, scales: Tensor, quant_map: Tensor, shape: tuple[int, int], blocksize: int
) -> Tensor:
    """Return `values @ weight.T` by the kernel.

    Args:
        values: bfloat16 `(..., columns)`.
        packed: `(rows, columns / 2)`.
        scales: From `packed_scales`.
        quant_map: The sixteen values of the codes; they tell the kernel whether the type is nf4 or fp4.
        shape: `(rows, columns)`.
        blocksize: The number of elements that share a scale.
    """
    # The kernel takes the distance between rows as an argument, and assumes that a row's elements are consecutive.
    product: Tensor = torch.ops.bitsandbytes.gemv_4bit.default(
        values.contiguous(), packed, shape, scales, quant_map, blocksize
    )
    return product
