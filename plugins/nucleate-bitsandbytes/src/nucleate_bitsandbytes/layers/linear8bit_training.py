"""A linear layer that trains in full or half precision, and computes with its weight rounded to eight bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nucleate_bitsandbytes.layers.frozen import compute_input, refuse_mismatch, trained, uncompiled
from nucleate_bitsandbytes.layers.products import Product8bit
from nucleate_bitsandbytes.library import bitsandbytes


class Linear8bitTraining(nn.Linear):
    """A layer that computes `input @ int8(weight).T + bias`; the weight's gradient ignores the rounding.

    Outputs and gradients are bit-identical to those of a fresh
    `bitsandbytes.nn.Linear8bitLt(has_fp16_weights=True)`. bitsandbytes' layer keeps the codes of an earlier forward
    while the weight has a gradient, and always in eval mode. This layer rounds the current weight at each forward. Its
    state dict is that of nn.Linear.

    Args:
        in_features: The number of columns of the weight.
        out_features: The number of rows of the weight.
        weight: `(out_features, in_features)`, float32, bfloat16 or float16; may be deferred.
        bias: `(out_features,)`.
        threshold: Input columns with a magnitude of at least this are not quantized; 0 quantizes all.
        compute_dtype: The dtype to compute in; None takes autocast's, or else the input's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        threshold: float = 0.0,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would make a weight
        self.in_features = in_features
        self.out_features = out_features
        self.threshold = threshold
        self.compute_dtype = compute_dtype
        self.weight = trained(weight)
        self.register_parameter("bias", None if bias is None else trained(bias))

    @uncompiled
    def forward(self, input: Tensor) -> Tensor:
        """Compute `input @ int8(weight).T + bias`.

        Args:
            input: `(..., in_features)`.

        Returns:
            `(..., out_features)`, in the dtype of the input.

        Raises:
            UsageError: The input has a wrong width, device or dtype.
        """
        refuse_mismatch(self, input)
        values = compute_input(input, self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(values.dtype)
        rows = values.reshape(-1, self.in_features)
        if not rows.shape[0]:
            return nn.functional.linear(values, self.weight.to(values.dtype), bias).to(input.dtype)
        product: Tensor
        if self.training and input.device.type not in ("cpu", "xpu"):
            product = self._product_by_kernels(rows, bias)
        else:
            halves = self.weight.detach().to(torch.float16)
            codes, scales, _ = bitsandbytes().functional.int8_vectorwise_quant(halves)
            threshold = None if self.training else self.threshold
            product = Product8bit.apply(rows, bias, self.weight, codes, scales, threshold)  # type: ignore[no-untyped-call]
        return product.view(*input.shape[:-1], self.out_features).to(input.dtype)

    def _product_by_kernels(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """Let bitsandbytes multiply: on these devices it quantizes input and gradients too, by columns and rows."""
        library = bitsandbytes()
        state = library.MatmulLtState()
        state.threshold = self.threshold
        product: Tensor = library.matmul(rows, self.weight, bias=bias, state=state)
        return product

    def extra_repr(self) -> str:
        """Describe the layer as nn.Linear does, and add its format."""
        compute = "" if self.compute_dtype is None else f", compute_dtype={self.compute_dtype}"
        return f"{super().extra_repr()}, int8 training, threshold={self.threshold}{compute}"
