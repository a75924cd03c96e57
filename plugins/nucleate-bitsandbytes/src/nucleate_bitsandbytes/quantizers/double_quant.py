"""The scales of 4-bit blocks, quantized to eight bits themselves: what bitsandbytes calls double quantization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nucleate.deferred.elements import Conversion, Layout, Output
from nucleate.errors import ConfigurationError, ConversionError
from nucleate_bitsandbytes.library import bitsandbytes


@dataclass(frozen=True)
class DoubleQuant(Conversion):
    """Makes of scales `(n,)` the codes `(n,)` of uint8, the scales `(ceil(n / blocksize),)`, and the offset `()`.

    The bits are those of `bitsandbytes.functional.quantize_4bit(..., compress_statistics=True)` (0.50.2). The offset is
    the mean, so all scales of a weight are converted together. They are so few, and the rounding of bitsandbytes'
    kernel depends so much on how it was compiled, that the kernel itself is called.

    Attributes:
        blocksize: How many scales share one of their own.
    """

    blocksize: int = 256

    def __post_init__(self) -> None:
        if self.blocksize <= 0:
            raise ConfigurationError(f"blocksize={self.blocksize!r} must be at least 1.")

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        numel = torch.Size(shape).numel()
        if len(shape) != 1 or numel == 0 or dtype != torch.float32:
            raise ConversionError(f"scales are a vector of float32 with elements, not {shape} of {dtype}.")
        nested = -(-numel // self.blocksize)
        return Layout(
            numel,
            (
                Output(shape, torch.uint8, numel),
                Output((nested,), torch.float32, nested),
                Output((), torch.float32, 1),
            ),
        )

    @torch.no_grad()
    def convert(self, values: Tensor, outs: Sequence[Tensor]) -> None:
        codes, nested, offset = outs
        mean = values.mean()
        if not mean.isfinite():
            raise ConversionError(
                f"the mean of the {values.numel()} scales is {mean.item()}, and cannot be the offset of their codes. "
                "Repair the weight, or quantize it without double quantization."
            )
        code = _code(values.device)  # before the operator is looked up, which it registers
        made = torch.ops.bitsandbytes.quantize_blockwise.default(values - mean, code, self.blocksize)
        codes.copy_(made[0])
        nested.copy_(made[1])
        offset.copy_(mean.view_as(offset))


@cache
def _code(device: torch.device) -> Tensor:
    """Return the 256 values of the codes: one tensor, since the kernel on the CPU remembers what it made of it."""
    library = bitsandbytes()
    with torch.inference_mode(False):
        code: Tensor = library.functional.create_dynamic_map().to(device)
    return code
