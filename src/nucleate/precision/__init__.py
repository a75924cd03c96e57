"""Precisions: dtypes of parameters and computation. A new one implements `Precision`, under `nucleate.precision`."""

from nucleate.precision.base import Precision
from nucleate.precision.fixed_dtype import FixedDtype
from nucleate.precision.freezing import layers_to_freeze
from nucleate.precision.full import FullPrecision
from nucleate.precision.half import HalfPrecision
from nucleate.precision.mixed import MixedPrecision
from nucleate.precision.no_cast import NoCastPrecision

__all__ = [
    "FixedDtype",
    "FullPrecision",
    "HalfPrecision",
    "MixedPrecision",
    "NoCastPrecision",
    "Precision",
    "layers_to_freeze",
]
