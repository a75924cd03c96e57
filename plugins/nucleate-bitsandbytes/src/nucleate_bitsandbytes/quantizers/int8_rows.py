"""Quantization to LLM.int8() of bitsandbytes: eight bits for each value, and a float32 for each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nucleate.deferred.elements import Conversion, Layout, Output
from nucleate.errors import ConversionError
from nucleate_bitsandbytes.library import bitsandbytes
from nucleate_bitsandbytes.quantizers.finite import check_dtype, is_finite, non_finite
from nucleate_bitsandbytes.quantizers.kernels import int8_codes, without_lock
from nucleate_bitsandbytes.quantizers.rows import rows_per_chunk, write_largest
from nucleate_bitsandbytes.quantizers.scratch import scratch

# bitsandbytes rounds to float16 first. This changes only bfloat16 values less than 2**-17. In a row with a value of at
# least the number below, these have the code 0, rounded or not.
_ROUNDING_IS_NO_MATTER = 2.0**-9


@dataclass(frozen=True)
class Int8Rows(Conversion):
    """A conversion from a weight `(out, in)` to int8 codes `(out, in)` and the largest magnitudes of the rows `(out,)`.

    The result is bit-identical to `bitsandbytes.nn.Int8Params` (0.50.2) on the whole weight. That class casts to
    float16 and calls `bitsandbytes.functional.int8_vectorwise_quant`.
    """

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        check_dtype(dtype, "int8")
        if len(shape) != 2 or shape[1] == 0:
            raise ConversionError(f"a tensor {shape} cannot be quantized to int8, only a matrix with columns can be.")
        return Layout(shape[1], (Output(shape, torch.int8, shape[1]), Output((shape[0],), torch.float32, 1)))

    @torch.no_grad()
    def convert(self, values: Tensor, outs: Sequence[Tensor]) -> None:
        codes, scales = outs
        if scales.numel() == 0:
            return
        rows = values.view(scales.numel(), -1)
        if values.device.type != "cpu":
            _convert_by_kernel(rows, codes, scales)
            return
        write_largest(rows, scales)
        is_rounded = rows.dtype == torch.float16 or (
            rows.dtype == torch.bfloat16 and scales.amin().item() >= _ROUNDING_IS_NO_MATTER
        )
        # Rounding keeps the order, so the rounded largest magnitude is also the largest rounded magnitude.
        scales.copy_(scales.half())
        if not scales.amax().item() <= torch.finfo(torch.float16).max:
            raise non_finite(rows.half(), "int8 (through float16, up to 65504)")
        # A row of zeros has codes of zero. Without this, 0 times infinity is NaN, whose cast depends on the machine.
        factors = (127.0 / scales).masked_fill_(scales == 0, 0).unsqueeze(1)
        per_chunk, columns = rows_per_chunk(rows), rows.shape[1]
        scaled = scratch("scaled", per_chunk * columns, torch.float32).view(per_chunk, columns)
        halves = scratch("halves", 0 if is_rounded else scaled.numel(), torch.float16).view(-1, columns)
        without_lock(int8_codes)(rows, factors, halves, scaled, scaled.view(torch.int32), codes.view_as(rows))


def _convert_by_kernel(rows: Tensor, codes: Tensor, scales: Tensor) -> None:
    halves = rows.half()
    # The kernels compute a maximum that ignores NaN.
    if not is_finite(halves):
        raise non_finite(halves, "int8 (through float16, up to 65504)")
    bitsandbytes()
    made = torch.ops.bitsandbytes.int8_vectorwise_quant.default(halves, 0.0)
    codes.copy_(made[0].view(-1))
    scales.copy_(made[1])
