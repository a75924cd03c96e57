"""Base classes of quantized linear layers, for the code that fills them from a state dict or a checkpoint."""

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
    """A layer with four bits for each weight. `Linear4bit` is the only subclass.

    Attributes:
        quant_type: `"nf4"` or `"fp4"`.
        blocksize: The number of weights that share a scale.
        quantized_dtype: The dtype that the weight was quantized from.
        absmax: The scales, or their codes.
        nested_absmax: The scales of the scales, if the scales are quantized.
        nested_offset: The number that is added to quantized scales.
    """

    quant_type: QuantType
    blocksize: int
    quantized_dtype: torch.dtype
    absmax: nn.Parameter
    nested_absmax: nn.Parameter | None
    nested_offset: Tensor | None
    #: Set when FSDP first exchanges the parameter. From then on the layer must not exchange the parameter's memory.
    is_sharded = False

    @property
    def nested(self) -> bool:
        """Whether the scales are quantized too."""
        return self.nested_absmax is not None

    @property
    def quantized(self) -> FourBitWeight:
        """The weight with its statistics."""
        raise NotImplementedError

    def take_statistics(self, weight: FourBitWeight) -> None:
        """Take over the statistics of a weight."""
        raise NotImplementedError


class EightBitLinear(QuantizedLinear):
    """A layer with eight bits for each weight, and a scale for each row. `Linear8bit` is the only subclass.

    Attributes:
        SCB: The scales, `(out_features,)`, under bitsandbytes' name.
    """

    SCB: nn.Parameter
