"""How numbers are kept and computed. A new one implements `Precision` and registers under `nucleate.precision`."""

from nucleate.precision.base import Precision
from nucleate.precision.full import FullPrecision
from nucleate.precision.half import HalfPrecision
from nucleate.precision.mixed import MixedPrecision

__all__ = ["FullPrecision", "HalfPrecision", "MixedPrecision", "Precision"]
