"""Replacement of linear layers by quantized ones, in a deferred model or a real one."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from nucleate.deferred import ElementSource, convert
from nucleate.errors import CheckpointError, ConfigurationError, ConversionError, name_list
from nucleate.precision import layers_to_freeze
from nucleate_bitsandbytes.layers import FourBitWeight, Linear4bit, Linear8bit, Linear8bitTraining
from nucleate_bitsandbytes.layers.lazy import description
from nucleate_bitsandbytes.layers.quantized import QuantizedLinear
from nucleate_bitsandbytes.options import Options
from nucleate_bitsandbytes.quantizers import DoubleQuant, FourBit, Int8Rows
from nucleate_bitsandbytes.quantizers.four_bit import QuantType
from nucleate_bitsandbytes.selection import linears_of

# Keys that a checkpoint has only for quantized weights, beside the codes.
_MARKS = re.compile(r"(?P<fqn>.*)\.(weight\.quant_state\.bitsandbytes__(?P<quant_type>\w+)|SCB)")

# Set in a module if a quantized checkpoint has decided which of its layers are quantized.
_SETTLED = "_nucleate_bitsandbytes_settled"
#: Nobody quantizes fewer weights than this (two megabytes in half precision) to save memory.
_WORTH_A_WARNING = 1 << 20


def quantize(model: nn.Module, options: Options) -> nn.Module:
    """Replace the linear layers of a model, in place, and return it, or the layer that takes its place.

    Beside frozen layers, layers that train are left alone; see `layers_to_freeze`. The mode `int8-training` freezes
    nothing, so it replaces both.

    Args:
        model: The model.
        options: The format, and the modules to skip.

    Raises:
        ConfigurationError: See `linears_of`.
        ConversionError: A real weight cannot be quantized.
    """
    layers = {}
    # The maker of a quantized checkpoint left the other layers in full precision on purpose.
    settled = {id(part) for module in model.modules() if _SETTLED in vars(module) for part in module.modules()}
    _warn_of_rest(model, options)
    linears = [(fqn, linear) for fqn, linear in linears_of(model, options.skip) if id(linear) not in settled]
    if options.freezes:
        has_frozen = any(isinstance(module, QuantizedLinear) for module in model.modules())
        advice = "`skip` of BitsandbytesPrecision also leaves layers as they are."
        linears = layers_to_freeze(linears, has_frozen=has_frozen, precision=options.name, advice=advice)
    for fqn, linear in linears:
        try:
            layers[linear] = _layer(linear, options)
        except ConversionError as error:
            raise ConversionError(f"{fqn or 'model'}.weight: {error}") from error
    return _replace(model, layers)


def prepare(model: nn.Module, options: Options, stored: Mapping[str, ElementSource]) -> None:
    """Replace the linear layers for which a checkpoint holds quantized weights, in the checkpoint's format.

    The model's other layers stay as they are: the checkpoint has them in full precision.

    Args:
        model: The model.
        options: The modules to skip, and the expected format.
        stored: The checkpoint's element sources, by the model's names.

    Raises:
        CheckpointError: The checkpoint holds quantized weights for skipped layers, for layers that train beside frozen
            ones, or in another format.
    """
    found = {match["fqn"]: match["quant_type"] for name in stored if (match := _MARKS.fullmatch(name))}
    modules = dict(model.named_modules(remove_duplicate=False))
    plain = {fqn: quant_type for fqn, quant_type in found.items() if type(modules.get(fqn)) is nn.Linear}
    if not plain:
        return
    wanted = {linear for _, linear in linears_of(model, options.skip)}
    alone = [fqn for fqn in plain if modules[fqn] not in wanted]
    if alone:
        skip = "a head" if options.skip is None else f"named by skip={list(options.skip)!r}"
        raise CheckpointError(
            f"{name_list(alone)} of the checkpoint are quantized, but precision {options.name!r} does not quantize "
            f"these layers: they are {skip}, tied, or kept in full by the model. Give a `skip` without them."
        )
    frozen = {fqn for fqn, _ in layers_to_freeze((fqn, cast(nn.Linear, modules[fqn])) for fqn in plain)}
    trained = [fqn for fqn in plain if fqn not in frozen]
    if trained:
        raise CheckpointError(
            f"{name_list(trained)} of the checkpoint are quantized, but these layers train: their weights require "
            "gradients, and other layers of the model are frozen. Quantized weights cannot train. Freeze these layers "
            "(`requires_grad_(False)`), or load a checkpoint that has their weights in full."
        )
    family = options.mode.removesuffix("-dq")
    other = {fqn: quant_type or "int8" for fqn, quant_type in plain.items() if (quant_type or "int8") != family}
    if other:
        fqn, held = next(iter(other.items()))
        raise CheckpointError(
            f"the checkpoint holds {fqn}.weight as {held}, but the precision is {options.name!r}. Use "
            f"precision='bnb-{held}', or load the checkpoint that it was quantized from."
        )
    layers = {}
    for fqn, quant_type in plain.items():
        mine = {name.removeprefix(f"{fqn}."): given for name, given in stored.items() if name.startswith(f"{fqn}.")}
        try:
            # A module that stands in several places has several names.
            linear = cast(nn.Linear, modules[fqn])
            if linear not in layers:
                layers[linear] = _layer(linear, options, description(mine) if quant_type else None)
        except (CheckpointError, ConfigurationError) as error:
            raise CheckpointError(f"{fqn}: {error}") from error
    vars(model)[_SETTLED] = True
    _replace(model, layers)


def _warn_of_rest(model: nn.Module, options: Options) -> None:
    """Warn if most weights of a model are in layers of other classes, which stay unquantized."""
    others: dict[str, int] = {}
    num_others = num_linear = 0
    for fqn, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            num_linear += module.in_features * module.out_features if isinstance(module, nn.Linear) else 0
            continue
        weights = [p for p in module._parameters.values() if p is not None and p.dim() > 1 and p.is_floating_point()]
        if weights:
            others.setdefault(f"{fqn} ({type(module).__name__})".lstrip(), sum(p.numel() for p in weights))
            num_others += sum(p.numel() for p in weights)
    if num_others > max(num_linear, _WORTH_A_WARNING):
        largest = sorted(others, key=lambda name: -others[name])
        warnings.warn(
            f"precision {options.name!r} quantizes only torch.nn.Linear, which has {num_linear} weights of this "
            f"{type(model).__name__}; {num_others} others stay in {options.dtype}: {name_list(largest, 3)}.",
            stacklevel=2,
        )


def _layer(linear: nn.Linear, options: Options, described: Mapping[str, object] | None = None) -> nn.Module:
    """Return the quantized layer for a linear layer; `described` is the 4-bit format, if not the precision's own."""
    shape, dtype = (linear.in_features, linear.out_features), options.dtype
    layer: nn.Module
    if options.mode == "int8-training":
        layer = Linear8bitTraining(*shape, linear.weight, linear.bias, threshold=options.threshold, compute_dtype=dtype)
    elif options.mode == "int8":
        codes, scales = convert(linear.weight, Int8Rows())
        layer = Linear8bit(*shape, codes, scales, linear.bias, threshold=options.threshold, compute_dtype=dtype)
    else:
        quant_type: QuantType = "nf4" if options.mode.startswith("nf4") else "fp4"
        is_nested = options.mode.endswith("-dq")
        blocksize, dtype = options.blocksize, linear.weight.dtype
        if described is not None:
            is_nested = "nested_offset" in described
            blocksize = described["blocksize"]  # type: ignore[assignment]
            dtype = getattr(torch, str(described.get("dtype")), dtype)
        codes, absmax = convert(linear.weight, FourBit(quant_type, blocksize))
        nested_absmax: Tensor | None = None
        offset: Tensor | None = None
        if is_nested:
            absmax, nested_absmax, offset = convert(absmax, DoubleQuant())
        weight = FourBitWeight(
            codes=codes,
            absmax=absmax,
            quant_type=quant_type,
            blocksize=blocksize,
            dtype=dtype,
            nested_absmax=nested_absmax,
            offset=offset,
        )
        layer = Linear4bit(*shape, weight, linear.bias, compute_dtype=options.dtype)
    for name, value in vars(linear).items():
        # Hooks, and attributes that users set on a module.
        if name not in vars(layer) or name.endswith("_hooks") or name == "training":
            vars(layer)[name] = value
    return layer


def _replace(model: nn.Module, layers: Mapping[nn.Linear, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        names = [name for name, child in parent._modules.items() if isinstance(child, nn.Linear) and child in layers]
        for name in names:
            child = parent._modules[name]
            assert isinstance(child, nn.Linear)
            parent._modules[name] = layers[child]
        if names and isinstance(parent, nn.TransformerEncoderLayer):
            # The fast path of this class multiplies with the weights directly (torch/nn/modules/transformer.py, 2.13).
            # 0 in this attribute turns the fast path off.
            parent.activation_relu_or_gelu = 0
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(
            isinstance(part, nn.TransformerEncoderLayer) and part.activation_relu_or_gelu == 0
            for part in encoder.layers
        ):
            # The encoder packs the input of that path without the padding. Its constructor made this decision.
            encoder.use_nested_tensor = False
    return layers[model] if isinstance(model, nn.Linear) and model in layers else model
