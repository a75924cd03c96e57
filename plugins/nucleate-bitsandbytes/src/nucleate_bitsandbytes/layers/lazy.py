"""Element sources for quantized layers, from a checkpoint whose tensors have not been read yet.

`loading4bit` and `loading8bit` do the same with tensors. Here every large tensor stays in its file, and a
full-precision weight is quantized while it is read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nucleate.checkpoint import StoredSources
from nucleate.deferred import ConvertedSource, ElementSource
from nucleate.errors import CheckpointError, name_list
from nucleate_bitsandbytes.layers.four_bit_weight import NESTED_BLOCKSIZE, nested_quant_map, quant_map, unpacked
from nucleate_bitsandbytes.layers.quantized import EightBitLinear, FourBitLinear, QuantizedLinear
from nucleate_bitsandbytes.quantizers import DoubleQuant, FourBit, Int8Rows

_PACKED = "weight.quant_state.bitsandbytes__"


class Known(ElementSource):
    """An element source that reads from a small tensor in memory.

    Args:
        tensor: The tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.shape, self._tensor = tensor.dtype, tuple(tensor.shape), tensor

    def read(self, start: int, out: Tensor) -> None:
        out.copy_(self._tensor.reshape(-1)[start : start + out.numel()])

    def order(self, start: int) -> tuple[int, int]:
        return (0, start)

    def describe(self) -> str:
        return f"{self.dtype} {self._tensor.tolist()}"


def take4bit(layer: FourBitLinear, stored: Mapping[str, ElementSource]) -> StoredSources:
    """Return the element sources for a 4-bit layer: codes and statistics in its format, or a full-precision weight.

    Raises:
        CheckpointError: The checkpoint has neither of these.
    """
    given, missing = _bias(layer, stored)
    if not any(name.startswith("weight.") for name in stored):
        if "weight" not in stored:
            return StoredSources(given, frozenset(given), (*missing, "weight"))
        weight = _full(stored["weight"], (layer.out_features, layer.in_features), "absmax, quant_map, quant_state")
        conversion, dtype = FourBit(layer.quant_type, layer.blocksize), layer.quantized_dtype
        given["weight"], given["absmax"] = (ConvertedSource(weight, conversion, number, dtype) for number in range(2))
        if layer.nested:
            for number, name in enumerate(("absmax", "nested_absmax", "nested_offset")):
                given[name] = ConvertedSource(ConvertedSource(weight, conversion, 1, dtype), DoubleQuant(), number)
        return StoredSources(given, frozenset(("weight", "bias")) & stored.keys(), missing)
    held = _format(layer)
    values = description(stored)
    there: dict[str, object] = {"quant_type": values.get("quant_type"), "blocksize": values.get("blocksize")}
    there["nested_blocksize"] = values.get("nested_blocksize") if "weight.nested_absmax" in stored else None
    here: dict[str, object] = {"quant_type": layer.quant_type, "blocksize": layer.blocksize}
    here["nested_blocksize"] = NESTED_BLOCKSIZE if layer.nested else None
    differing = [
        f"{name} is {there[name]!r} there and {here[name]!r} here" for name in here if there[name] != here[name]
    ]
    if differing:
        raise CheckpointError(
            f"the stored weight has another format than this layer, {held}: {name_list(differing)}. Set the model up "
            "with the precision of the checkpoint, or load the full-precision weights."
        )
    shape = (layer.out_features, layer.in_features)
    if values.get("shape") != list(shape):
        raise CheckpointError(f"it was quantized from the shape {values.get('shape')}, but the layer has {shape}.")
    names = {"weight": "weight", "weight.absmax": "absmax"}
    maps = {"weight.quant_map": quant_map(layer.quant_type, torch.device("cpu"))}
    if layer.nested:
        names["weight.nested_absmax"] = "nested_absmax"
        maps["weight.nested_quant_map"] = nested_quant_map(torch.device("cpu"))
        given["nested_offset"] = Known(torch.tensor(float(str(values.get("nested_offset"))), dtype=torch.float32))
    lacking = [name for name in (*names, *maps) if name not in stored]
    if lacking:
        raise CheckpointError(f"the checkpoint has the codes of its weight, but not {name_list(lacking)}.")
    for name, known in maps.items():
        if not torch.equal(_read(stored[name]).float(), known):
            raise CheckpointError(f"{name} holds other values than those of the format {layer.quant_type}.")
    for name, own in names.items():
        given[own] = _fitting(name, stored[name], getattr(layer, own))
    used = {*names, *maps, "bias", next(name for name in stored if name.startswith(_PACKED))}
    return StoredSources(given, frozenset(used) & stored.keys(), missing)


def take8bit(layer: EightBitLinear, stored: Mapping[str, ElementSource]) -> StoredSources:
    """Return the element sources for an 8-bit layer: codes and scales, or a full-precision weight.

    Raises:
        CheckpointError: The checkpoint has neither of these.
    """
    given, missing = _bias(layer, stored)
    used = frozenset(("weight", "SCB", "weight_format", "bias")) & stored.keys()
    if "weight" not in stored:
        return StoredSources(given, frozenset(given), (*missing, "weight"))
    if "SCB" not in stored:
        weight = _full(stored["weight"], (layer.out_features, layer.in_features), "SCB")
        # The same result as loading the weight before the layer is quantized.
        given["weight"], given["SCB"] = (
            ConvertedSource(weight, Int8Rows(), number, layer.compute_dtype) for number in range(2)
        )
        return StoredSources(given, used, missing)
    if "weight_format" in stored and int(_read(stored["weight_format"])) != 0:
        raise CheckpointError("weight_format is not 0: the codes are stored in an order that is no longer in use.")
    for name in ("weight", "SCB"):
        given[name] = _fitting(name, stored[name], getattr(layer, name))
    return StoredSources(given, used, missing)


def description(stored: Mapping[str, ElementSource]) -> Mapping[str, object]:
    """Return bitsandbytes' description of a 4-bit weight, from the element sources of its layer.

    Raises:
        CheckpointError: The description is missing or cannot be read.
    """
    names = [name for name in stored if name.startswith(_PACKED)]
    if len(names) != 1:
        raise CheckpointError(f"there should be one {_PACKED}nf4 or __fp4, but there are {name_list(stored)}.")
    given = stored[names[0]]
    if given.dtype != torch.uint8 or len(given.shape) != 1 or given.shape[0] > 1 << 16:
        raise CheckpointError(f"{names[0]} is {given.dtype} {given.shape}, not a few bytes.")
    try:
        values = dict(unpacked(_read(given)))
    except ValueError as error:
        raise CheckpointError(f"{names[0]} does not describe a quantized weight: {error}.") from error
    if names[0] != f"{_PACKED}{values.get('quant_type')}":
        raise CheckpointError(f"{names[0]} says that quant_type is {values.get('quant_type')!r}.")
    return values


def _bias(
    layer: QuantizedLinear, stored: Mapping[str, ElementSource]
) -> tuple[dict[str, ElementSource], tuple[str, ...]]:
    if layer.bias is None:
        return {}, ()
    if "bias" not in stored:
        return {}, ("bias",)
    if stored["bias"].shape != (layer.out_features,) or not stored["bias"].dtype.is_floating_point:
        raise CheckpointError(
            f"bias is {stored['bias'].dtype} {stored['bias'].shape} in the checkpoint and {layer.bias.dtype} "
            f"{(layer.out_features,)} here."
        )
    return {"bias": stored["bias"]}, ()


def _full(weight: ElementSource, shape: tuple[int, int], statistics: str) -> ElementSource:
    if not weight.dtype.is_floating_point:
        raise CheckpointError(
            f"weight is {weight.dtype} {weight.shape} in the checkpoint, without the statistics ({statistics}) that "
            f"give it a meaning. Give a complete quantized state, or a floating point weight of shape {shape}."
        )
    if tuple(weight.shape) != shape:
        raise CheckpointError(f"weight is {tuple(weight.shape)} in the checkpoint and {shape} here.")
    return weight


def _fitting(name: str, given: ElementSource, tensor: Tensor) -> ElementSource:
    if given.shape != tuple(tensor.shape) or given.dtype != tensor.dtype:
        raise CheckpointError(
            f"{name} is {given.dtype} {given.shape} in the checkpoint and {tensor.dtype} {tuple(tensor.shape)} here."
        )
    return given


def _format(layer: FourBitLinear) -> str:
    return f"{layer.quant_type}{'-dq' if layer.nested else ''} with blocksize {layer.blocksize}"


def _read(given: ElementSource) -> Tensor:
    out = torch.empty(given.shape, dtype=given.dtype, device="cpu")
    given.read(0, out.view(-1))
    return out
