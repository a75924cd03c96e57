"""Precisions: dtypes of parameters and computation. A new one implements `Precision`, under `nucleate.precision`."""

from nucleate.precision.base import Precision
from nucleate.precision.fixed_dtype import FixedDtype
from nucleate.precision.full import FullPrecision
from nucleate.precision.half import HalfPrecision
from nucleate.precision.mixed import MixedPrecision

__all__ = ["FixedDtype", "FullPrecision", "HalfPrecision", "MixedPrecision", "Precision"]
