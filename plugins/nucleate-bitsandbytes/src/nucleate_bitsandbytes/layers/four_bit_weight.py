"""Four-bit weights: the tensors and values of a quantized weight, and their form in bitsandbytes' state dicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import torch
from torch import Tensor

from nucleate.deferred import eager
from nucleate.errors import ConfigurationError
from nucleate_bitsandbytes.library import bitsandbytes
from nucleate_bitsandbytes.quantizers.four_bit import QuantType

#: Dtypes to quantize from, compute in, and dequantize to. For others, bitsandbytes' kernels leave the output unwritten.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANT_TYPES = get_args(QuantType)
#: The number of `absmax` elements that share one element of `nested_absmax`; bitsandbytes supports only this number.
NESTED_BLOCKSIZE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBitWeight:
    """A quantized weight `(out_features, in_features)` of `n` elements; its tensors may be deferred.

    Attributes:
        codes: Two elements in a byte, uint8 `((n + 1) // 2, 1)`.
        absmax: The scale of each block, float32 `(num_blocks,)`. With double quantization, the scales' codes, uint8.
        quant_type: `"nf4"` or `"fp4"`.
        blocksize: The number of elements that share a scale.
        dtype: The dtype of the weight before quantization and after `dequantize`.
        nested_absmax: With double quantization, the scales of the scales, float32 `(ceil(num_blocks / 256),)`.
        offset: With double quantization, the mean of the scales, float32 `()`.
    """

    codes: Tensor
    absmax: Tensor
    quant_type: QuantType
    blocksize: int = 64
    dtype: torch.dtype = torch.bfloat16
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None

    def check(self, shape: tuple[int, int]) -> None:
        """Check that this can be a quantized weight of the given shape, without reading tensor values.

        Raises:
            ConfigurationError: It cannot be one.
        """
        problem = self.problem(shape)
        if problem is not None:
            raise ConfigurationError(f"a 4-bit weight of shape {shape}: {problem}")

    def problem(self, shape: tuple[int, int]) -> str | None:
        """Return why this cannot be a quantized weight of the given shape, or None."""
        if self.quant_type not in QUANT_TYPES:
            return f"quant_type is {self.quant_type!r}, not one of {', '.join(QUANT_TYPES)}."
        if not isinstance(self.blocksize, int) or self.blocksize < 32 or self.blocksize & (self.blocksize - 1):
            return f"blocksize is {self.blocksize!r}, not a power of two of at least 32."
        if self.dtype not in DTYPES:
            return f"it was quantized from {self.dtype}, which is not one of {', '.join(map(str, DTYPES))}."
        if (self.nested_absmax is None) != (self.offset is None):
            return "nested_absmax and offset belong together, and one is missing."
        num_blocks = -(-shape[0] * shape[1] // self.blocksize)
        wanted: list[tuple[str, Tensor | None, torch.dtype, tuple[int, ...]]] = [
            ("weight", self.codes, torch.uint8, ((shape[0] * shape[1] + 1) // 2, 1)),
            ("absmax", self.absmax, torch.float32 if self.offset is None else torch.uint8, (num_blocks,)),
            ("nested_absmax", self.nested_absmax, torch.float32, (-(-num_blocks // NESTED_BLOCKSIZE),)),
            ("nested_offset", self.offset, torch.float32, ()),
        ]
        for name, tensor, dtype, wanted_shape in wanted:
            if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != wanted_shape):
                return f"{name} is {tensor.dtype} {tuple(tensor.shape)} instead of {dtype} {wanted_shape}."
        return None


def packed_values(weight: FourBitWeight, shape: tuple[int, int]) -> dict[str, Any]:
    """Return the values that bitsandbytes saves beside a weight's tensors, in its order. This reads the offset.

    Args:
        weight: The weight.
        shape: `(out_features, in_features)`.
    """
    values: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.blocksize,
        "dtype": dtype_name(weight.dtype),
        "shape": shape,
    }
    if weight.offset is not None:
        values["nested_blocksize"] = NESTED_BLOCKSIZE
        values["nested_dtype"] = "float32"
        values["nested_offset"] = weight.offset.item()
    return values


def unpacked(packed: Tensor) -> Mapping[str, Any]:
    """Return the values that bitsandbytes packed into a tensor: JSON in UTF-8.

    Raises:
        ValueError: The tensor holds something else.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ValueError(f"it is {packed.dtype} {tuple(packed.shape)}, not bytes")
    found = json.loads(bytes(packed.tolist()).decode())
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not a dict")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without the module."""
    return str(dtype).removeprefix("torch.")


def quant_map(quant_type: str, device: torch.device) -> Tensor:
    """Return the sixteen values of 4-bit codes, float32 `(16,)`. The tensor is shared: clone it before saving."""
    return _constant(quant_type, device)


def nested_quant_map(device: torch.device) -> Tensor:
    """Return the values of the codes of doubly quantized scales, float32 `(256,)`. The tensor is shared."""
    return _constant("dynamic", device)


@cache
def _constant(name: str, device: torch.device) -> Tensor:
    # The first caller may be recording, be in inference mode, or have another default dtype or device.
    with eager(), torch.inference_mode(False), torch.device("cpu"):
        functional = bitsandbytes().functional
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            made: Tensor = (
                functional.create_dynamic_map() if name == "dynamic" else functional.get_4bit_type(name, device="cpu")
            )
        finally:
            torch.set_default_dtype(before)
        return made.to(device)
