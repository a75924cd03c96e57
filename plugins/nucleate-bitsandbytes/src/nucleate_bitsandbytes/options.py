"""Quantization options: the arguments of `BitsandbytesPrecision`, for the functions that replace layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a precision; see `BitsandbytesPrecision`.

    Attributes:
        name: The precision's name in messages.
        mode: The mode, such as `"nf4"`.
        dtype: The dtype that products are computed in.
        skip: Names of modules that are not quantized.
        blocksize: The number of weights that share a scale.
        threshold: Columns with a magnitude of at least this are not quantized.
    """

    name: str
    mode: str
    dtype: torch.dtype
    skip: tuple[str, ...] | None
    blocksize: int
    threshold: float

    @property
    def freezes(self) -> bool:
        """Whether the mode keeps codes, which cannot train. `int8-training` keeps weights, which train."""
        return self.mode != "int8-training"
