"""Loading of 4-bit layers from state dicts: quantized weights in any form of bitsandbytes, or full-precision weights.

All checks happen before any change. Content that does not fit is refused by name, whether loading is strict or not:
codes without their statistics, or another tensor's bytes, would be garbage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nucleate.deferred import convert, record_of
from nucleate.errors import ConversionError, NucleateError, name_list
from nucleate_bitsandbytes.layers.four_bit_weight import (
    NESTED_BLOCKSIZE,
    QUANT_TYPES,
    FourBitWeight,
    nested_quant_map,
    quant_map,
    unpacked,
)
from nucleate_bitsandbytes.layers.frozen import RefusedError, check_bias, laid_out_like
from nucleate_bitsandbytes.layers.quantized import FourBitLinear
from nucleate_bitsandbytes.quantizers import DoubleQuant, FourBit
from nucleate_bitsandbytes.quantizers.four_bit import QuantType


def load_weight(
    layer: FourBitLinear,
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> dict[str, Any] | None:
    """Check a state dict's content for a layer's weight, and return it under the names of the layer's parameters.

    Args:
        layer: The layer. If the state dict has another format than the layer, the layer takes over that format.
        state_dict: The state dict; it is not changed.
        prefix: The layer's name with a dot.
        local_metadata: Torch's metadata of the module.
        missing: Torch's list; receives the missing names.
        unexpected: Torch's list; receives the unexpected names.
        errors: Torch's list; receives a message for content that does not fit.

    Returns:
        The state dict that torch must load into the layer; None if the layer must stay unchanged.
    """
    behind = f"{prefix}weight."
    inside = {key[len(behind) :]: value for key, value in state_dict.items() if key.startswith(behind)}
    rest = {key: value for key, value in state_dict.items() if not key.startswith(behind)}
    held = rest.pop(f"{prefix}weight", None)
    for name in ("absmax", "nested_absmax"):
        # A state dict never holds entries under these parameter names, so torch must list them as unexpected.
        if f"{prefix}{name}" in rest:
            unexpected.append(f"{prefix}{name}")
            del rest[f"{prefix}{name}"]
    own: dict[str, Tensor] = {
        f"{prefix}{name}": p for name, p in layer.named_parameters(recurse=False) if name != "bias"
    }
    is_loaded = held is not None
    try:
        check_bias(layer, rest.get(f"{prefix}bias"))
        if held is None and inside:
            raise RefusedError(f"there are {name_list(sorted(inside))} but no codes (`weight`).")
        if held is not None:
            weight = _weight(layer, held, inside)
            own = _placed(layer, weight, prefix, bool(local_metadata.get("assign_to_params_buffers")))
    except NucleateError as error:
        errors.append(f"{prefix}weight cannot be loaded into a 4-bit layer: {error}")
        return None
    if not is_loaded:
        missing.append(f"{prefix}weight")
    return {**rest, **own}


def _weight(layer: FourBitLinear, held: Any, inside: Mapping[str, Any]) -> FourBitWeight:
    shape = (layer.out_features, layer.in_features)
    if not isinstance(held, Tensor):
        raise RefusedError(f"it is a {type(held).__name__}, not a tensor.")
    if inside:
        return _quantized(held, inside, shape)
    if not held.is_floating_point():
        own = layer.weight
        is_own = held.dtype == own.dtype and held.shape == own.shape
        what = "has the codes of a quantized weight" if is_own else f"is {held.dtype} {tuple(held.shape)}"
        raise RefusedError(
            f"it {what}, without the statistics (weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__*) "
            f"that give it a meaning. Give a complete quantized state, or a floating point weight of shape {shape}."
        )
    if tuple(held.shape) != shape:
        raise RefusedError(f"it has the shape {tuple(held.shape)} there and {shape} here, and no statistics.")
    return quantize(held, layer.quant_type, layer.blocksize, layer.nested)


def quantize(weight: Tensor, quant_type: QuantType, blocksize: int, nested: bool) -> FourBitWeight:
    """Quantize a whole weight `(out_features, in_features)` to four bits.

    Raises:
        ConversionError: It has values or a dtype that cannot be quantized.
    """
    if isinstance(weight, DTensor) or record_of(weight) is not None or weight.is_meta:
        kind = "sharded" if isinstance(weight, DTensor) else "without values yet"
        raise ConversionError(f"a full-precision weight that is {kind} cannot be quantized here; give a whole one.")
    codes, absmax = convert(weight, FourBit(quant_type, blocksize))
    statistics: dict[str, Tensor] = {}
    if nested:
        absmax, statistics["nested_absmax"], statistics["offset"] = convert(absmax, DoubleQuant())
    return FourBitWeight(
        codes=codes, absmax=absmax, quant_type=quant_type, blocksize=blocksize, dtype=weight.dtype, **statistics
    )


def _quantized(held: Tensor, inside: Mapping[str, Any], shape: tuple[int, int]) -> FourBitWeight:
    """Read a quantized weight from the tensors of a state dict."""
    packed = [key for key in inside if key.startswith("quant_state.bitsandbytes__")]
    if len(packed) != 1:
        raise RefusedError(
            f"there must be one weight.quant_state.bitsandbytes__nf4 or __fp4 beside it, but there are "
            f"{name_list(sorted(inside))}."
        )
    needed = {"absmax", "quant_map"}
    if "nested_absmax" in inside or "nested_quant_map" in inside:
        needed |= {"nested_absmax", "nested_quant_map"}
    lacking, strange = sorted(needed - inside.keys()), sorted(inside.keys() - needed - {packed[0]})
    if lacking or strange:
        raise RefusedError(
            f"its statistics lack {name_list(lacking) or 'nothing'} and have {name_list(strange) or 'nothing'} in "
            "addition."
        )
    try:
        values = dict(unpacked(inside[packed[0]]))
        dtype = getattr(torch, str(values["dtype"]))
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{values['dtype']!r} is not a dtype")
        there = tuple(values["shape"])
        quant_type, blocksize = values["quant_type"], values["blocksize"]
        nested = (values["nested_blocksize"], values["nested_dtype"]) if "nested_absmax" in needed else None
        offset = torch.tensor(float(values["nested_offset"]), dtype=torch.float32) if nested is not None else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefusedError(f"weight.{packed[0]} cannot be read: {type(error).__name__}: {error}.") from error
    if there != shape:
        raise RefusedError(f"it was quantized from the shape {there}, but the layer has {shape}.")
    if nested not in (None, (NESTED_BLOCKSIZE, "float32")):
        raise RefusedError(
            f"nested_blocksize and nested_dtype are {nested}, but must be {(NESTED_BLOCKSIZE, 'float32')}."
        )
    if packed[0] != f"quant_state.bitsandbytes__{quant_type}":
        raise RefusedError(f"weight.{packed[0]} says that quant_type is {quant_type!r}.")
    weight = FourBitWeight(
        codes=_as_bytes(held),
        absmax=inside["absmax"],
        quant_type=quant_type,
        blocksize=blocksize,
        dtype=dtype,
        nested_absmax=inside.get("nested_absmax"),
        offset=offset,
    )
    problem = weight.problem(shape)
    if problem is not None:
        raise RefusedError(problem)
    assert quant_type in QUANT_TYPES
    _check_map("quant_map", inside["quant_map"], quant_map(quant_type, torch.device("cpu")))
    if nested is not None:
        _check_map("nested_quant_map", inside["nested_quant_map"], nested_quant_map(torch.device("cpu")))
    return weight


def _as_bytes(held: Tensor) -> Tensor:
    """Return codes as bytes. A state dict may store them in another dtype (`quant_storage`)."""
    return (
        held
        if held.dtype == torch.uint8 or isinstance(held, DTensor)
        else held.reshape(-1, 1).view(torch.uint8).reshape(-1, 1)
    )


def _check_map(name: str, found: Tensor, known: Tensor) -> None:
    if found.is_meta or record_of(found) is not None:
        return
    if found.shape != known.shape or not torch.equal(found.detach().to("cpu", torch.float32), known):
        raise RefusedError(f"weight.{name} holds other values than those of this format.")


def _placed(layer: FourBitLinear, weight: FourBitWeight, prefix: str, assign: bool) -> dict[str, Tensor]:
    """Prepare the layer's parameters for a weight, and return the tensors that torch must copy or assign to them."""
    new = {"weight": weight.codes, "absmax": weight.absmax}
    if weight.nested_absmax is not None:
        new["nested_absmax"] = weight.nested_absmax
    old = {name: p for name, p in layer.named_parameters(recurse=False) if name != "bias"}
    fits = old.keys() == new.keys() and all(
        old[name].shape == tensor.shape and old[name].dtype == tensor.dtype for name, tensor in new.items()
    )
    if not fits:
        if isinstance(layer.weight, DTensor) or layer.is_sharded or record_of(layer.weight) is not None:
            state = "deferred" if record_of(layer.weight) is not None else "sharded"
            raise RefusedError(
                f"it is {_format(weight)} there, and {_format(layer.quantized)} here. A {state} layer cannot change "
                "its format. Set the model up with the format of the checkpoint, or load the full-precision weight."
            )
        device = layer.weight.device
        empty = {name: torch.empty_like(tensor, device=device) for name, tensor in new.items()}
        layer.take_statistics(
            FourBitWeight(
                codes=layer.weight,
                absmax=empty["absmax"],
                quant_type=weight.quant_type,
                blocksize=weight.blocksize,
                dtype=weight.dtype,
                nested_absmax=empty.get("nested_absmax"),
                offset=None if weight.offset is None else weight.offset.to(device),
            )
        )
    else:
        layer.quant_type, layer.blocksize, layer.quantized_dtype = weight.quant_type, weight.blocksize, weight.dtype
        here = layer.nested_offset
        if weight.offset is not None and here is not None:
            if assign or here.is_meta:
                layer.nested_offset = weight.offset.to("cpu" if here.is_meta else here.device)
            else:
                here.copy_(weight.offset)
    return {f"{prefix}{name}": laid_out_like(getattr(layer, name), tensor) for name, tensor in new.items()}


def _format(weight: FourBitWeight) -> str:
    nested = "-dq" if weight.nested_absmax is not None else ""
    return f"{weight.quant_type}{nested} with blocksize {weight.blocksize}"
