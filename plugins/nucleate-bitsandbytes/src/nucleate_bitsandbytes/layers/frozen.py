"""Helpers of all quantized layers: parameters that are neither trained nor cast, and checks of inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nucleate import layout
from nucleate.errors import NucleateError, UsageError
from nucleate_bitsandbytes.layers.four_bit_weight import DTYPES

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """Make graphs of `torch.compile` break at a function, because its operators read and exchange memory."""
    return cast(F, torch.compiler.disable(function))


def frozen(tensor: Tensor) -> nn.Parameter:
    """Return a parameter that is not trained. An existing parameter stays the same object, which keeps ties."""
    if isinstance(tensor, nn.Parameter):
        tensor.requires_grad_(False)
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


def trained(tensor: Tensor) -> nn.Parameter:
    """Return a parameter. An existing parameter stays the same object, trained or not."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def kept_apply(fn: Callable[[Tensor], Tensor], kept: Sequence[Tensor | None]) -> Callable[[Tensor], Tensor]:
    """Return a function for `Module._apply` that moves the `kept` tensors but never casts them.

    Args:
        fn: The function that `Module.to`, `half` and the like apply to each tensor.
        kept: Tensors whose dtype is part of their meaning.
    """
    ids = {id(tensor) for tensor in kept if tensor is not None}

    def applied(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if id(tensor) in ids and result.dtype != tensor.dtype:
            return tensor.to(result.device)
        return result

    return applied


class RefusedError(NucleateError):
    """An error for state dict content that does not fit a layer; the message goes to torch's list."""


def check_bias(layer: nn.Linear, bias: Any) -> None:
    """Raise RefusedError if the bias in a state dict has another shape than the layer's."""
    if isinstance(bias, Tensor) and layer.bias is not None and bias.shape != layer.bias.shape:
        raise RefusedError(f"bias is {tuple(bias.shape)} there and {tuple(layer.bias.shape)} here.")


def laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a value in the layout of a parameter: if the parameter is sharded, only this rank's shard."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    return layout.laid_out_like(parameter, value.detach().to(parameter.device))


def compute_input(input: Tensor, compute_dtype: torch.dtype | None) -> Tensor:
    """Return an input in the dtype to multiply in: the layer's, or else autocast's, or else its own.

    Raises:
        UsageError: No kernel supports that dtype.
    """
    if compute_dtype is None:
        device = input.device.type
        is_cast = input.is_floating_point() and torch.is_autocast_enabled(device)
        compute_dtype = torch.get_autocast_dtype(device) if is_cast else input.dtype
    if compute_dtype not in DTYPES or not input.is_floating_point():
        raise UsageError(
            f"a quantized layer got an input of {input.dtype}; it takes {', '.join(map(str, DTYPES))}. Cast the input, "
            "or give the layer a compute_dtype."
        )
    return input.to(compute_dtype)


def refuse_mismatch(layer: Any, input: Tensor) -> None:
    """Raise UsageError if an input does not have the layer's width and device: kernels would read other memory."""
    if not input.dim() or input.shape[-1] != layer.in_features:
        raise UsageError(
            f"an input of shape {tuple(input.shape)} does not fit a layer of {layer.in_features} input features "
            f"({layer.out_features} output features)."
        )
    if input.device != layer.weight.device:
        raise UsageError(
            f"the input is on {input.device} but the quantized weight on {layer.weight.device}. Move one to the other."
        )


def refuse_sharded(weight: Tensor) -> None:
    """Raise UsageError if this rank has only a shard of a layer's codes."""
    if isinstance(weight, DTensor):
        raise UsageError(
            "this rank holds only a shard of the quantized weight, which is not enough to compute. Call the module "
            "that FSDP gathers (or its `unshard()`), not the layer inside."
        )


def refuse_cast(layer: nn.Linear, scales: Tensor, dtype: torch.dtype) -> None:
    """Raise UsageError if a layer's scales no longer have the dtype that they were made in."""
    if scales.dtype != dtype:
        raise UsageError(
            f"the scales of a quantized layer ({layer.in_features} to {layer.out_features} features) are "
            f"{scales.dtype} now, which changes the weight. Something cast them without asking the layer. FSDP's "
            "`mixed_precision` does this to parameters that are not trained. Leave `param_dtype` out: the layer casts "
            "its input to compute_dtype."
        )
