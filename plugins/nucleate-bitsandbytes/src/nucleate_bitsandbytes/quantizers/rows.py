"""Rows of values that share a scale: the largest magnitude of each row, and the number of rows in a chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from nucleate_bitsandbytes.quantizers.kernels import largest_of_rows, without_lock
from nucleate_bitsandbytes.quantizers.scratch import scratch

#: The largest number of elements in a chunk (one row, if a row has more). The intermediates of so many stay in the
#: second-level cache, and torch does not split operations on less than 1 << 15 elements over its own threads
#: (`at::internal::GRAIN_SIZE`, aten/src/ATen/native/TensorIteratorReduce.cpp in torch 2.13; it does split reductions of
#: exactly that number).
CHUNK_NUMEL = (1 << 15) - 1


def rows_per_chunk(rows: Tensor) -> int:
    """Return the number of `rows` that are converted at a time."""
    return max(1, min(rows.shape[0], CHUNK_NUMEL // rows.shape[1]))


def write_largest(rows: Tensor, largest: Tensor) -> None:
    """Write the largest magnitude of each row. It is not finite if any value of the row is not finite.

    Args:
        rows: Floats `(rows, columns)`, not empty.
        largest: Receives the magnitudes, float32 `(rows,)`.
    """
    per_chunk = rows_per_chunk(rows)
    integer, mask = (torch.int32, 0x7FFFFFFF) if rows.dtype == torch.float32 else (torch.int16, 0x7FFF)
    magnitudes = scratch("magnitudes", per_chunk * rows.shape[1], integer).view(per_chunk, -1)
    if integer == torch.int32:
        without_lock(largest_of_rows)(rows.view(integer), mask, per_chunk, magnitudes, largest.view(integer))
    else:
        bits = scratch("largest", largest.numel(), integer)
        without_lock(largest_of_rows)(rows.view(integer), mask, per_chunk, magnitudes, bits)
        largest.copy_(bits.view(rows.dtype))
