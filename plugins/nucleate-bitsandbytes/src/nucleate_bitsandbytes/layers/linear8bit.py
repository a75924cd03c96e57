"""A linear layer whose weight has eight bits per element and a scale per row (LLM.int8()).

Codes and scales are ordinary parameters. `loading8bit` decides the allowed content of a state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from nucleate.checkpoint import StoredSources
from nucleate.deferred import ElementSource
from nucleate.errors import ConfigurationError, UsageError
from nucleate_bitsandbytes.layers.frozen import (
    compute_input,
    frozen,
    kept_apply,
    refuse_cast,
    refuse_mismatch,
    refuse_sharded,
    trained,
    uncompiled,
)
from nucleate_bitsandbytes.layers.lazy import take8bit
from nucleate_bitsandbytes.layers.loading8bit import load_weight
from nucleate_bitsandbytes.layers.products import Product8bit, dequantized8bit
from nucleate_bitsandbytes.layers.quantized import EightBitLinear


class Linear8bit(EightBitLinear):
    """A layer that computes `input @ weight.T + bias` for a frozen int8 weight.

    Outputs, gradients and state dict are bit-identical to those of
    `bitsandbytes.nn.Linear8bitLt(has_fp16_weights=False)`. In eval mode the layer quantizes the input too, and
    multiplies integers. In train mode on a CPU it dequantizes the weight, as bitsandbytes does.

    Args:
        in_features: The number of columns of the weight.
        out_features: The number of rows of the weight.
        codes: int8 `(out_features, in_features)`; may be deferred.
        scales: The largest magnitude of each row, float32 `(out_features,)`; may be deferred.
        bias: `(out_features,)`. It trains if it is a parameter that requires gradients.
        threshold: Input columns with a magnitude of at least this are not quantized; 0 quantizes all.
        compute_dtype: The dtype to compute in; None takes autocast's, or else the input's.

    Raises:
        ConfigurationError: Codes, scales or bias do not have these shapes and dtypes.
    """

    fixed_dtype = ("weight", "SCB")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None = None,
        *,
        threshold: float = 0.0,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would make a weight
        for name, tensor, dtype, shape in (
            ("codes", codes, torch.int8, (out_features, in_features)),
            ("scales", scales, torch.float32, (out_features,)),
            ("bias", bias, None, (out_features,)),
        ):
            if tensor is not None and (tuple(tensor.shape) != shape or dtype not in (None, tensor.dtype)):
                raise ConfigurationError(
                    f"an int8 weight of shape {(out_features, in_features)}: {name} is {tensor.dtype} "
                    f"{tuple(tensor.shape)} instead of {dtype or tensor.dtype} {shape}."
                )
        if threshold < 0:
            raise ConfigurationError(f"threshold={threshold} must be at least 0.")
        self.in_features = in_features
        self.out_features = out_features
        self.threshold = threshold
        self.compute_dtype = compute_dtype
        self.weight = frozen(codes)
        self.SCB = frozen(scales)
        self.register_parameter("bias", None if bias is None else trained(bias))

    def dequantize(self, dtype: torch.dtype = torch.float16) -> Tensor:
        """Return the dequantized weight `(out_features, in_features)`.

        Args:
            dtype: The dtype of the result.

        Raises:
            UsageError: The weight is sharded now.
        """
        refuse_sharded(self.weight)
        refuse_cast(self, self.SCB, torch.float32)
        return dequantized8bit(self.weight.detach(), self.SCB.detach(), dtype)

    @uncompiled
    def forward(self, input: Tensor) -> Tensor:
        """Compute `input @ weight.T + bias`.

        Args:
            input: `(..., in_features)`.

        Returns:
            `(..., out_features)`, in the dtype of the input.

        Raises:
            UsageError: The input has a wrong width, device or dtype, or the weight is sharded now.
        """
        refuse_mismatch(self, input)
        refuse_sharded(self.weight)
        refuse_cast(self, self.SCB, torch.float32)
        values = compute_input(input, self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(values.dtype)
        rows = values.reshape(-1, self.in_features)
        if not rows.shape[0]:
            zeros = values.new_zeros(1, 1).expand(self.out_features, self.in_features)
            return nn.functional.linear(values, zeros, bias).to(input.dtype)
        # Detached: code that exchanges the parameter's memory before backward does not change these tensors.
        codes, scales = self.weight.detach(), self.SCB.detach()
        # bitsandbytes has no fast integer kernels for training on these devices, and dequantizes.
        threshold = None if self.training and input.device.type in ("cpu", "xpu") else self.threshold
        product: Tensor = Product8bit.apply(rows, bias, None, codes, scales, threshold)  # type: ignore[no-untyped-call]
        return product.view(*input.shape[:-1], self.out_features).to(input.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(kept_apply(fn, [self.weight, self.SCB]), recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}SCB"] = destination.pop(f"{prefix}SCB")  # after the bias, as in bitsandbytes
        # 0 means by rows, the only order that bitsandbytes still supports.
        destination[f"{prefix}weight_format"] = torch.zeros((), dtype=torch.uint8, device="cpu")

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        with torch.no_grad():
            state_dict = load_weight(self, state_dict, prefix, *lists)
        if state_dict is not None:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def bind_stored(self, stored: Mapping[str, ElementSource]) -> StoredSources:
        """Return the element sources for this layer, from a checkpoint whose tensors are still in its files."""
        return take8bit(self, stored)

    def reset_parameters(self) -> None:
        """Refuse to initialize: a quantized weight cannot be initialized in place.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "the weight of an int8 layer is quantized and cannot be initialized. Initialize before `setup`."
        )

    def extra_repr(self) -> str:
        """Describe the layer as nn.Linear does, and add its format."""
        compute = "" if self.compute_dtype is None else f", compute_dtype={self.compute_dtype}"
        return f"{super().extra_repr()}, int8, threshold={self.threshold}{compute}"
