"""The options of the precision, for those who replace layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Options:
    """How layers are quantized.

    Attributes:
        name: What messages call the precision.
        mode: See `BitsandbytesPrecision`, likewise the others.
        dtype: What products are computed in.
        skip: Names of modules that are left alone.
        blocksize: How many weights share a scale.
        threshold: From which magnitude on columns are not quantized.
    """

    name: str
    mode: str
    dtype: torch.dtype
    skip: tuple[str, ...] | None
    blocksize: int
    threshold: float
