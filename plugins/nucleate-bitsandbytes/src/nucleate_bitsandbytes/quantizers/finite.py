"""What is done about values that have no place in any code: they are counted, and refused."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nucleate.errors import ConversionError

#: What bitsandbytes takes.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(dtype: torch.dtype, target: str) -> None:
    """Refuse a dtype that bitsandbytes does not quantize.

    Args:
        dtype: Of what is to be quantized.
        target: What it is to become, for the message.

    Raises:
        ConversionError: It is not one of `DTYPES`.
    """
    if dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ConversionError(f"{str(dtype).removeprefix('torch.')} cannot be quantized to {target}, only {names} can.")


def is_finite(values: Tensor) -> bool:
    """Return whether there is neither a NaN nor an infinity, reading each value once."""
    if values.numel() == 0:
        return True
    return all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(values)).tolist())


def non_finite(values: Tensor, target: str) -> ConversionError:
    """Return the error that tells which values are not finite.

    Args:
        values: Of any shape; some are NaN or infinite.
        target: What they were to become, for the message.
    """
    values = values.reshape(-1)
    num_nan = int(values.isnan().sum())
    num_inf = int(values.isinf().sum())
    first = int(values.isfinite().logical_not().nonzero()[0])
    counts = [f"{num_nan} NaN"] * (num_nan > 0) + [f"{num_inf} infinite"] * (num_inf > 0)
    return ConversionError(
        f"{' and '.join(counts)} of {values.numel()} values (the first is {values[first].item()}, element {first} of "
        f"the blocks converted together) cannot be quantized to {target}: the scale of their block would be lost, and "
        "with it every value there. Repair the weight, or leave its layer unquantized."
    )
