"""Loops over the chunks of a weight, for Python and for TorchScript, which runs them without Python's lock.

A chunk is a number of rows that are converted together. Each chunk takes a dozen operations of a few microseconds.
Threads that return to Python after each operation spend their time on handing the lock to each other: two threads are
slower than one. With TorchScript, one call converts all chunks, and two threads take half the time. TorchScript is
deprecated, but nothing else in torch does this without a compiler. If torch has no TorchScript, Python runs the same
functions and gets the same bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import ParamSpec

import torch
from torch import Tensor

_P = ParamSpec("_P")


def largest_of_rows(rows: Tensor, mask: int, per_chunk: int, magnitudes: Tensor, largest: Tensor) -> None:
    """Write the largest magnitude of each row.

    The bits of floats without the sign, read as integers, have the same order as the magnitudes, and NaN is the
    largest. The maximum of integers is several times as fast.

    Args:
        rows: The bits of floats, as integers `(rows, columns)`.
        mask: All bits except the sign.
        per_chunk: The number of rows in a chunk.
        magnitudes: Scratch for a chunk, `(per_chunk, columns)`.
        largest: Receives the magnitudes, `(rows,)`.
    """
    num, chunk = 0, magnitudes
    for first in range(0, rows.size(0), per_chunk):
        if min(per_chunk, rows.size(0) - first) != num:
            num = min(per_chunk, rows.size(0) - first)
            chunk = magnitudes.narrow(0, 0, num)
        torch.bitwise_and(rows.narrow(0, first, num), mask, out=chunk)
        torch.amax(chunk, [1], out=largest.narrow(0, first, num))


def four_bit_codes(
    blocks: Tensor,
    to_bins: Tensor,
    inverses: Tensor,
    book: list[Tensor],
    is_sure: bool,
    scratch: list[Tensor],
    codes: Tensor,
) -> None:
    """Write the packed 4-bit codes of blocks.

    Args:
        blocks: Floats `(blocks, blocksize)`.
        to_bins: Factors that turn a block's values into bin numbers, `(blocks, 1)`.
        inverses: Factors that turn a block's values into scaled values, `(blocks,)`.
        book: The table, midpoints and codes of a codebook.
        is_sure: Whether each bin of the table has a code.
        scratch: Scratch for a chunk of blocks: floats `(chunk, blocksize)`, flat int32, flat uint8, and flat int16 in
            the same memory as uint8.
        codes: Receives the codes, `(blocks * blocksize / 2,)`.
    """
    table, midpoints, sorted_codes = book[0], book[1], book[2]
    columns = blocks.size(1)
    per_chunk = scratch[0].size(0)
    middle = table.size(0) // 2
    num, scaled, bins, found, pairs = 0, scratch[0], scratch[1], scratch[2], scratch[3]
    flat = scaled
    for first in range(0, blocks.size(0), per_chunk):
        if min(per_chunk, blocks.size(0) - first) != num:
            # Only in the first iteration and the last: each operation costs a microsecond, however little it does.
            num = min(per_chunk, blocks.size(0) - first)
            scaled = scratch[0].narrow(0, 0, num)
            flat = scaled.view(-1)
            bins = scratch[1].narrow(0, 0, num * columns)
            found = scratch[2].narrow(0, 0, num * columns)
            pairs = scratch[3].narrow(0, 0, num * columns // 2)
        chunk = blocks.narrow(0, first, num)
        torch.mul(chunk, to_bins.narrow(0, first, num), out=scaled)
        bins.copy_(flat).add_(middle)
        torch.index_select(table, 0, bins, out=found)
        if not is_sure and int(found.amax()) > 15:
            # Bins that contain a midpoint.
            unsure = torch.nonzero(found > 15).squeeze(1)
            values = torch.index_select(chunk.view(-1), 0, unsure).float()
            rows = torch.div(unsure, columns, rounding_mode="floor")
            exact = values * torch.index_select(inverses.narrow(0, first, num), 0, rows)
            found.index_copy_(0, unsure, torch.index_select(sorted_codes, 0, torch.bucketize(exact, midpoints)))
        # Two codes in each byte, the first in the upper half. The 16 bits `b a` (a comes first in memory), times
        # 0x1001, have `a b` in the bits 8 to 15.
        pairs.mul_(4097).bitwise_right_shift_(8)
        codes.narrow(0, first * columns // 2, num * columns // 2).copy_(pairs)


def int8_codes(rows: Tensor, factors: Tensor, halves: Tensor, scaled: Tensor, bits: Tensor, codes: Tensor) -> None:
    """Write the 8-bit codes of rows.

    Adding 1.5 * 2^23 to a float32 of less than 2^22 rounds it to an integer, halves to even as `round` does, and puts
    the integer in the lowest bits. torch's `round` splits even very little work over its own threads.

    Args:
        rows: Floats `(rows, columns)`.
        factors: Factors that turn a row's values into unrounded codes, `(rows, 1)`.
        halves: Scratch for a chunk of float16 rows. If it is empty, rows are not rounded to float16 first.
        scaled: Scratch for a chunk of float32 rows.
        bits: The same memory as `scaled`, as int32.
        codes: Receives the codes, `(rows, columns)`.
    """
    per_chunk = scaled.size(0)
    num, products, results, rounded = 0, scaled, bits, halves
    for first in range(0, rows.size(0), per_chunk):
        if min(per_chunk, rows.size(0) - first) != num:
            num = min(per_chunk, rows.size(0) - first)
            products, results = scaled.narrow(0, 0, num), bits.narrow(0, 0, num)
            if halves.numel() > 0:
                rounded = halves.narrow(0, 0, num)
        chunk = rows.narrow(0, first, num)
        if halves.numel() > 0:
            chunk = rounded.copy_(chunk)
        products.copy_(chunk).mul_(factors.narrow(0, first, num)).add_(12582912.0)
        codes.narrow(0, first, num).copy_(results)


@cache
def without_lock(kernel: Callable[_P, None]) -> Callable[_P, None]:
    """Return a function of this file as TorchScript, or unchanged if torch has no TorchScript."""
    try:
        # From the function's text, because `torch.jit.script` warns.
        unit = torch.jit.CompilationUnit(inspect.getsource(kernel))
        script: Callable[_P, None] = getattr(unit, kernel.__name__)
    except Exception:
        return kernel
    return script
