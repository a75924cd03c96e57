"""Quantization to nf4 and fp4 of bitsandbytes: four bits for each value, and a float32 for each block of values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from nucleate.deferred.elements import Conversion, Layout, Output
from nucleate.errors import ConfigurationError
from nucleate_bitsandbytes.library import bitsandbytes
from nucleate_bitsandbytes.quantizers.codebook import SCALE, SMALLEST, Codebook, codebook
from nucleate_bitsandbytes.quantizers.finite import check_dtype, is_finite, non_finite
from nucleate_bitsandbytes.quantizers.kernels import four_bit_codes, without_lock
from nucleate_bitsandbytes.quantizers.rows import rows_per_chunk, write_largest
from nucleate_bitsandbytes.quantizers.scratch import scratch

QuantType = Literal["nf4", "fp4"]

_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Codes of blocks whose largest value is less, but not zero, are searched for: its inverse times SCALE may be infinite.
_TINY = 1e-30


@dataclass(frozen=True)
class FourBit(Conversion):
    """A conversion from `n` weights to uint8 codes `(ceil(n / 2), 1)` and scales `(ceil(n / blocksize),)`.

    The result is bit-identical to `bitsandbytes.functional.quantize_4bit` (0.50.2) on the whole weight.

    Attributes:
        quant_type: `"nf4"` or `"fp4"`.
        blocksize: The number of values that share a scale. The scale is the largest of their magnitudes.
    """

    quant_type: QuantType
    blocksize: int = 64

    def __post_init__(self) -> None:
        if self.quant_type not in get_args(QuantType):
            raise ConfigurationError(f"quant_type={self.quant_type!r} is unknown. Give 'nf4' or 'fp4'.")
        if self.blocksize not in _BLOCKSIZES:
            raise ConfigurationError(f"blocksize={self.blocksize!r} must be one of {', '.join(map(str, _BLOCKSIZES))}.")

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        check_dtype(dtype, self.quant_type)
        numel = torch.Size(shape).numel()
        codes = Output((-(-numel // 2), 1), torch.uint8, self.blocksize // 2)
        scales = Output((-(-numel // self.blocksize),), torch.float32, 1)
        return Layout(self.blocksize, (codes, scales))

    @torch.no_grad()
    def convert(self, values: Tensor, outs: Sequence[Tensor]) -> None:
        codes, scales = outs
        if values.device.type != "cpu":
            self._convert_by_kernel(values, codes, scales)
            return
        num_whole = values.numel() // self.blocksize
        whole = values[: num_whole * self.blocksize].view(num_whole, self.blocksize)
        if num_whole:
            self._convert_whole(whole, codes[: whole.numel() // 2], scales[:num_whole])
        if whole.numel() < values.numel():
            self._convert_rest(values[whole.numel() :], codes[whole.numel() // 2 :], scales[num_whole:])

    def _convert_by_kernel(self, values: Tensor, codes: Tensor, scales: Tensor) -> None:
        # The kernels compute a maximum that ignores NaN.
        if not is_finite(values):
            raise non_finite(values, self.quant_type)
        bitsandbytes()
        made = torch.ops.bitsandbytes.quantize_4bit.default(values, self.blocksize, self.quant_type, torch.uint8)
        codes.copy_(made[0].view(-1))
        scales.copy_(made[1])

    def _convert_whole(self, blocks: Tensor, codes: Tensor, scales: Tensor) -> None:
        write_largest(blocks, scales)
        least, largest = torch.aminmax(scales)
        if not largest.item() <= torch.finfo(torch.float32).max:
            raise non_finite(blocks, self.quant_type)
        book = codebook(self.quant_type, blocks.dtype)
        numel = rows_per_chunk(blocks) * self.blocksize
        pairs = scratch("pairs", numel // 2, torch.int16)
        memory = [
            scratch("scaled", numel, torch.float32).view(-1, self.blocksize),
            scratch("bins", numel, torch.int32),
            pairs.view(torch.uint8),
            pairs,
        ]
        without_lock(four_bit_codes)(
            blocks,
            (SCALE / scales.clamp(min=_TINY)).unsqueeze(1),
            1.0 / scales.clamp(min=SMALLEST),
            [book.table, book.midpoints, book.codes],
            book.is_sure,
            memory,
            codes,
        )
        if least.item() < _TINY:
            self._convert_tiny(book, blocks, codes, scales)

    def _convert_tiny(self, book: Codebook, blocks: Tensor, codes: Tensor, scales: Tensor) -> None:
        tiny = ((scales < _TINY) & (scales > 0)).nonzero().squeeze(1)
        if tiny.numel():
            inverse = 1.0 / scales[tiny].clamp(min=SMALLEST)
            scaled = (blocks[tiny].float() * inverse.unsqueeze(1)).clamp(-1, 1)
            codes.view(-1, self.blocksize // 2)[tiny] = _packed(book.search(scaled))

    def _convert_rest(self, rest: Tensor, codes: Tensor, scales: Tensor) -> None:
        """Convert the end of a tensor. bitsandbytes divides it, but multiplies whole blocks by an inverse."""
        values = rest.float()
        largest = values.abs().amax().clamp(min=SMALLEST)
        if not largest.isfinite():
            raise non_finite(rest, self.quant_type)
        scaled = (values / largest).clamp(-1, 1)
        if scaled.numel() % 2:
            scaled = torch.cat([scaled, scaled.new_zeros(1)])
        codes.copy_(_packed(codebook(self.quant_type, rest.dtype).search(scaled)))
        scales.copy_(largest)


def _packed(found: Tensor) -> Tensor:
    """Return two codes in each byte, the first in the upper half."""
    return found[..., ::2] * 16 + found[..., 1::2]
