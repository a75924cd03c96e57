"""Loading of int8 layers from state dicts: a quantized weight, or a full-precision weight that is then quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nucleate.deferred import convert, record_of
from nucleate.errors import ConversionError, NucleateError
from nucleate_bitsandbytes.layers.frozen import RefusedError, check_bias, laid_out_like
from nucleate_bitsandbytes.layers.quantized import EightBitLinear
from nucleate_bitsandbytes.quantizers import Int8Rows


def load_weight(
    layer: EightBitLinear,
    state_dict: Mapping[str, Any],
    prefix: str,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> dict[str, Any] | None:
    """Check a state dict's content for a layer's weight, and return the state dict that torch must load.

    Args:
        layer: The layer.
        state_dict: The state dict; it is not changed.
        prefix: The layer's name with a dot.
        missing: Torch's list; receives the missing names.
        unexpected: Torch's list.
        errors: Torch's list; receives a message for content that does not fit.

    Returns:
        The state dict that torch must load; None if the layer must stay unchanged.
    """
    rest = dict(state_dict)
    held = rest.pop(f"{prefix}weight", None)
    scales = rest.pop(f"{prefix}SCB", None)
    order = rest.pop(f"{prefix}weight_format", None)
    new: tuple[Tensor, ...] = (layer.weight, layer.SCB)
    try:
        check_bias(layer, rest.get(f"{prefix}bias"))
        if held is None and scales is not None:
            raise RefusedError("there are scales (SCB) but no codes (`weight`).")
        if held is None:
            missing.append(f"{prefix}weight")
        else:
            new = _weight(layer, held, scales, order)
    except NucleateError as error:
        errors.append(f"{prefix}weight cannot be loaded into an int8 layer: {error}")
        return None
    rest[f"{prefix}weight"] = laid_out_like(layer.weight, new[0])
    rest[f"{prefix}SCB"] = laid_out_like(layer.SCB, new[1])
    return rest


def _weight(layer: EightBitLinear, held: Any, scales: Any, order: Any) -> tuple[Tensor, ...]:
    shape = (layer.out_features, layer.in_features)
    if not isinstance(held, Tensor) or tuple(held.shape) != shape:
        found = tuple(held.shape) if isinstance(held, Tensor) else type(held).__name__
        raise RefusedError(f"it is {found} there and {shape} here.")
    if held.is_floating_point():
        if scales is not None:
            raise RefusedError(f"it is {held.dtype}, and there are scales (SCB), which belong to int8 codes.")
        return quantize(held)
    if held.dtype != torch.int8:
        raise RefusedError(f"it is {held.dtype}; allowed are int8 codes with SCB, and floating point weights.")
    if not isinstance(scales, Tensor):
        raise RefusedError("it has the codes of a quantized weight, without the scales (SCB) that give them a meaning.")
    if scales.dtype != torch.float32 or tuple(scales.shape) != shape[:1]:
        raise RefusedError(f"SCB is {scales.dtype} {tuple(scales.shape)} instead of {torch.float32} {shape[:1]}.")
    # A number or a word: 0 and "row" mean by rows. The other orders belong to old GPUs.
    if order is not None and (order.item() if isinstance(order, Tensor) else order) not in (0, "row"):
        raise RefusedError(f"weight_format is {order}; only rows (0) are supported.")
    return held, scales


def quantize(weight: Tensor) -> tuple[Tensor, ...]:
    """Quantize a whole weight `(out_features, in_features)` to int8 codes and the scales of its rows.

    Raises:
        ConversionError: It has values or a dtype that cannot be quantized.
    """
    if isinstance(weight, DTensor) or record_of(weight) is not None or weight.is_meta:
        kind = "sharded" if isinstance(weight, DTensor) else "without values yet"
        raise ConversionError(f"a full-precision weight that is {kind} cannot be quantized here; give a whole one.")
    return convert(weight, Int8Rows())
