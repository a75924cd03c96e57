"""Quantized linear layers, as those see them who fill them from a state dict or from a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nucleate.checkpoint import StoredForm
from nucleate.precision import FixedDtype
from nucleate_bitsandbytes.layers.four_bit_weight import FourBitWeight
from nucleate_bitsandbytes.quantizers.four_bit import QuantType


class QuantizedLinear(nn.Linear, FixedDtype, StoredForm):
    """A linear layer whose weight is kept as codes and scales.

    Attributes:
        compute_dtype: The dtype to multiply in; None takes autocast's, or else the input's.
    """

    compute_dtype: torch.dtype | None


class FourBitLinear(QuantizedLinear):
    """A layer of four bits for each weight. `Linear4bit` is the only one.

    Attributes:
        quant_type: `"nf4"` or `"fp4"`.
        blocksize: How many weights share a scale.
        quantized_dtype: What the weight was quantized from.
        absmax: The scales, or their codes.
        nested_absmax: The scales of the scales, if these are quantized.
        nested_offset: What is added to quantized scales.
    """

    quant_type: QuantType
    blocksize: int
    quantized_dtype: torch.dtype
    absmax: nn.Parameter
    nested_absmax: nn.Parameter | None
    nested_offset: Tensor | None
    #: Set by FSDP's first exchange of the parameter: the memory of such a one is not this layer's to exchange.
    is_sharded = False

    @property
    def nested(self) -> bool:
        """Whether the scales are quantized themselves."""
        return self.nested_absmax is not None

    @property
    def quantized(self) -> FourBitWeight:
        """The weight with its statistics."""
        raise NotImplementedError

    def take_statistics(self, weight: FourBitWeight) -> None:
        """Have the statistics of a weight."""
        raise NotImplementedError


class EightBitLinear(QuantizedLinear):
    """A layer of eight bits for each weight, with a scale for each row. `Linear8bit` is the only one.

    Attributes:
        SCB: The scales, `(out_features,)`, by the name that bitsandbytes gives them.
    """

    SCB: nn.Parameter
