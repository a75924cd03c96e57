"""A strategy and a precision for nucleate, to copy."""

from nucleate_example.compressed import CompressedStrategy
from nucleate_example.stochastic import StochasticPrecision

__all__ = ["CompressedStrategy", "StochasticPrecision"]
