"""Checks of values that no code can stand for: NaN and infinite values are counted and refused."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nucleate.errors import ConversionError

#: The dtypes that bitsandbytes quantizes.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(dtype: torch.dtype, target: str) -> None:
    """Refuse a dtype that bitsandbytes does not quantize.

    Args:
        dtype: The dtype of the tensor to quantize.
        target: The name of the target format, for the message.

    Raises:
        ConversionError: The dtype is not in `DTYPES`.
    """
    if dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ConversionError(f"{str(dtype).removeprefix('torch.')} cannot be quantized to {target}, only {names} can.")


def is_finite(values: Tensor) -> bool:
    """Return whether all values are finite, reading each value once."""
    if values.numel() == 0:
        return True
    return all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(values)).tolist())


def non_finite(values: Tensor, target: str) -> ConversionError:
    """Return an error that tells how many values are not finite, and which is the first.

    Args:
        values: A tensor of any shape, with some NaN or infinite values.
        target: The name of the target format, for the message.
    """
    values = values.reshape(-1)
    num_nan = int(values.isnan().sum())
    num_inf = int(values.isinf().sum())
    first = int(values.isfinite().logical_not().nonzero()[0])
    counts = [f"{num_nan} NaN"] * (num_nan > 0) + [f"{num_inf} infinite"] * (num_inf > 0)
    return ConversionError(
        f"{' and '.join(counts)} of {values.numel()} values (the first is {values[first].item()}, element {first} of "
        f"the blocks converted together) cannot be quantized to {target}: such a value destroys the scale of its "
        "block, and so all values there. Repair the weight, or leave its layer unquantized."
    )
