"""Double quantization: the scales of 4-bit blocks are quantized to eight bits."""

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
    """A conversion from scales `(n,)` to uint8 codes `(n,)`, scales `(ceil(n / blocksize),)`, and an offset `()`.

    The result is bit-identical to `bitsandbytes.functional.quantize_4bit(..., compress_statistics=True)` (0.50.2). The
    offset is the mean, so all scales of a weight are converted together. This class calls the kernel of bitsandbytes,
    because the scales are few and the kernel's rounding depends on its compilation.

    Attributes:
        blocksize: The number of scales that share one scale.
    """

    blocksize: int = 256

    def __post_init__(self) -> None:
        if self.blocksize <= 0:
            raise ConfigurationError(f"blocksize={self.blocksize!r} must be at least 1.")

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        numel = torch.Size(shape).numel()
        if len(shape) != 1 or numel == 0 or dtype != torch.float32:
            raise ConversionError(f"scales must be a non-empty vector of float32, not {shape} of {dtype}.")
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
                f"the mean of the {values.numel()} scales is {mean.item()}, which cannot be the offset of their codes. "
                "Repair the weight, or quantize it without double quantization."
            )
        code = _code(values.device)  # First: this registers the operator of the next line.
        made = torch.ops.bitsandbytes.quantize_blockwise.default(values - mean, code, self.blocksize)
        codes.copy_(made[0])
        nested.copy_(made[1])
        offset.copy_(mean.view_as(offset))


@cache
def _code(device: torch.device) -> Tensor:
    """Return the 256 values of the codes, always the same tensor: the kernel on the CPU caches a result for it."""
    library = bitsandbytes()
    with torch.inference_mode(False):
        code: Tensor = library.functional.create_dynamic_map().to(device)
    return code
